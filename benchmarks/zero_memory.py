"""What a rank holds by stage of ZeRO, against the formula of the paper.

Rajbhandari et al., 2020 (arXiv:1910.02054), section 3: of a model of P parameters in mixed
precision with Adam, a process holds 2P bytes of parameters, 2P of gradients and 12P of optimizer
state, a copy of the parameters in 32-bit included. Of N processes each holds a part of N: at stage
1 of the optimizer state, at stage 2 of the gradients too, at stage 3 of the parameters too. In
32-bit it is 4P, 4P and 8P, since the parameters are their own copy.

Each strategy trains a GPT for two steps in fresh ranks. Counted is behind the backward pass of the
second, before its step, where gradients are held: the memory of every tensor that there is, once,
however many tensors share it, by what it belongs to. "Other" is what belongs to neither: buffers of
buckets, and copies. "Private" is by how much the memory that the process shares with nobody grew
since before the model was made, whatever it is for; activations are gone by then. The rank that
holds most counts.
"""

import argparse
import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from report import circumstances, installed, table, write
from torch import Tensor, nn

from torchweft.testing import run_ranks

sys.path.append(str(Path(__file__).parents[1] / "examples" / "language_model"))
from gpt import GPT

MIB = 2**20
PARTS = ("parameters", "gradients", "optimizer", "other")

#: By the stage that a strategy has, as the formula counts it.
STRATEGIES = {
    "ddp": 0,
    "deepspeed:stage=0": 0,
    "deepspeed_stage_1": 1,
    "deepspeed_stage_2": 2,
    # By default small parameters are whole everywhere.
    "deepspeed_stage_3:stage3_param_persistence_threshold=0": 3,
}

#: Bytes for each parameter: itself, its gradient, and what the optimizer keeps of it.
BYTES = {"32-true": (4, 4, 8), "bf16-mixed": (2, 2, 12)}

#: Of what a GPT is made, and the tokens of a batch.
SIZES = {"tiny": (64, 32, 1, 1, 8), "medium": (256, 512, 8, 8, 64)}


def formula(stage: int, ranks: int, parameters: int, precision: str) -> dict[str, float]:
    """Bytes of each part in a rank."""
    per = BYTES[precision]
    divided = (stage >= 3, stage >= 2, stage >= 1)
    return {
        part: parameters * size / (ranks if split else 1)
        for part, size, split in zip(PARTS, per, divided, strict=False)
    }


# -- in a rank -------------------------------------------------------------------------------------


def measure(fabric: Any, size: str, steps: int = 2) -> dict[str, float]:
    """Bytes of each part, ``private``, and how many parameters the model has."""
    vocabulary, width, depth, heads, context = SIZES[size]
    libc = ctypes.CDLL(None)
    for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: freed memory goes back
        libc.mallopt(option, 1 << 16)
    _train(fabric, GPT(64, 8, 32, 1, 1), torch.zeros(1, 9, dtype=torch.long), 1)
    gc.collect()
    foreign, before = set(_storages(_living())), _private()
    torch.manual_seed(0)
    with fabric.init_module():
        plain = GPT(vocabulary, context, width, depth, heads)
    tokens = torch.randint(vocabulary, (1, context + 1))
    model, optimizer = _train(fabric, plain, tokens, steps)
    gc.collect()
    libc.malloc_trim(0)
    held = {key: n for key, n in _storages(_living()).items() if key not in foreign}
    private = _private() - before
    told: dict[str, float] = {}
    counted: set[int] = set()
    for part, tensors in _owned(model, optimizer).items():
        # Gradients may have no Python object until somebody looks.
        mine = {key: n for key, n in _storages(tensors).items() if key not in foreign | counted}
        counted |= mine.keys()
        told[part] = sum(mine.values())
    told["other"] = sum(n for key, n in held.items() if key not in counted)
    told["private"] = private
    original = fabric.strategy.original(model.prepared)
    told["count"] = sum(getattr(p, "ds_numel", p.numel()) for p in original.parameters())
    return told


def _train(fabric: Any, plain: nn.Module, tokens: Tensor, steps: int) -> tuple[Any, Any]:
    """Steps, of the last of which the backward pass alone."""
    model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=1e-4))
    for step in range(steps):
        logits = model(tokens[:, :-1])
        fabric.backward(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        del logits
        if step + 1 < steps:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def _living() -> list[Tensor]:
    return [each for each in gc.get_objects() if isinstance(each, Tensor)]


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes by address, of what takes memory."""
    found = {}
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if not tensor.is_meta and storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _private() -> int:
    """Bytes that this process alone has."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(r.split()[1]) for r in rows if r.startswith("Private_Dirty:"))


def _owned(model: Any, optimizer: Any) -> dict[str, list[Any]]:
    """The tensors of each part, in the order in which they are asked for; a later one is less."""
    parameters = list(model.module.parameters())
    live = getattr(model.prepared, "live", None)
    zero = getattr(live, "optimizer", None)
    stepped = zero.optimizer if hasattr(zero, "optimizer") else optimizer.optimizer
    state = [value for slots in stepped.state.values() for value in slots.values()]
    copies = [p for group in stepped.param_groups for p in group["params"]]
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups"):
        copies += _flat(getattr(zero, name, ()))
    gradients = [p.grad for p in [*parameters, *copies]]
    for name in ("averaged_gradients", "grad_partitions_flat_buffer"):
        gradients += _flat(getattr(zero, name, ()))
    return {
        "parameters": [getattr(p, "ds_tensor", p) for p in parameters] + parameters,
        "gradients": gradients,
        "optimizer": state + copies,
    }


def _flat(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _flat(each)


# -- figures ---------------------------------------------------------------------------------------


def figures(strategy: str, ranks: int, precision: str, size: str) -> dict[str, float]:
    """Of the rank that holds most."""
    told = run_ranks(ranks, measure, size, strategy=strategy, precision=precision, timeout=300)
    return max(told, key=lambda each: sum(each[part] for part in PARTS))


def rows(results: dict[str, dict[str, float]], ranks: int, precision: str) -> list[list[str]]:
    shown = []
    for name, found in results.items():
        right = formula(STRATEGIES[name], ranks, int(found["count"]), precision)
        mine = sum(found[part] for part in PARTS[:3])
        shown.append(
            [
                name.partition(":stage3")[0],
                *(f"{found[part] / MIB:.1f}" for part in PARTS[:3]),
                f"{mine / MIB:.1f}",
                f"{sum(right.values()) / MIB:.1f}",
                f"{mine / sum(right.values()):.3f}",
                f"{found['other'] / MIB:.1f}",
                f"{found['private'] / MIB:.1f}",
            ]
        )
    return shown


HEAD = ["MiB", *PARTS[:3], "sum", "formula", "ratio", "other", "private"]


def plot(path: str, results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    """Stacked bars by strategy, and the formula as a line over each."""
    import matplotlib

    # The same figures make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "torchweft"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (title, by_ranks) in zip(panels, results.items(), strict=True):
        ranks, precision = title.split(" ranks, ")
        for x, (name, found) in enumerate(by_ranks["strategies"].items()):
            below = 0.0
            for part, colour in zip(PARTS[:3], ("#4c72b0", "#dd8452", "#55a868"), strict=True):
                height = found[part] / MIB
                label = part if x == 0 else None
                axes.bar(x, height, 0.7, below, color=colour, label=label)
                below += height
            right = formula(STRATEGIES[name], int(ranks), int(found["count"]), precision)
            y = sum(right.values()) / MIB
            label = "formula" if x == 0 else None
            axes.plot([x - 0.42, x + 0.42], [y, y], color="black", linewidth=1.5, label=label)
        labels = ["ddp" if n == "ddp" else f"stage {s}" for n, s in STRATEGIES.items()]
        axes.set_xticks(range(len(labels)), labels, rotation=30)
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("MiB in each rank")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--precision", nargs="+", choices=list(BYTES), default=list(BYTES))
    parser.add_argument("--size", choices=list(SIZES), default="medium")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--plot", metavar="FILE", help="draw them; needs matplotlib")
    asked = parser.parse_args()
    around = circumstances()
    versions: dict[str, Any] = {"deepspeed": installed("deepspeed")}
    versions["torchweft-deepspeed"] = installed("torchweft-deepspeed")
    around["versions"] = {**around["versions"], **versions}  # type: ignore[dict-item]
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for precision in asked.precision:
        for ranks in asked.ranks:
            found = {name: figures(name, ranks, precision, asked.size) for name in STRATEGIES}
            results[f"{ranks} ranks, {precision}"] = {"strategies": found}
            count = next(iter(found.values()))["count"]
            print(f"\n{ranks} ranks, {precision}, {count / 1e6:.1f} million parameters")
            print(table(HEAD, rows(found, ranks, precision)), flush=True)
    print()
    print(around)
    write(asked.json, {**around, "results": results})
    if asked.plot:
        plot(asked.plot, results)


if __name__ == "__main__":
    main()
