"""What a rank holds by stage of ZeRO, against the formula of the paper.

Rajbhandari et al., 2020 (arXiv:1910.02054), section 3: of a model of P parameters in mixed
precision with Adam, a process holds 2P bytes of parameters, 2P of gradients and 12P of optimizer
state, a copy of the parameters in 32-bit included. Of N processes each holds a part of N: at stage
1 of the optimizer state, at stage 2 of the gradients too, at stage 3 of the parameters too. In
32-bit it is 4P, 4P and 8P, since the parameters are their own copy.

Each strategy trains a GPT for two steps in fresh ranks. Counted is behind the backward pass of the
second, before its step, where gradients are held: the memory of every tensor that there is, once,
however many tensors share it, by what it belongs to. "Other" is what belongs to no part: buffers of
buckets, and copies. "Private" is by how much the memory that the process shares with nobody grew
since before the model was made, whatever it is for; activations are gone by then, and a model of
one such block has trained before, so that what torch keeps for its computation does not count.
"Between" is the same behind the step and ``zero_grad``. The rank that holds most counts.

A second table has, to the byte, why the sum differs from the formula, by what is known of how
DeepSpeed divides; what is not known would be in its last column.
"""

import argparse
import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import circumstances, installed, table, write
from torch import Tensor, nn

from torchweft.testing import run_ranks

sys.path.append(str(Path(__file__).parents[1] / "examples" / "language_model"))
from gpt import GPT

MIB = 2**20
PARTS = ("parameters", "gradients", "optimizer", "other")


class Kind(NamedTuple):
    """What of a strategy the formula depends on, and what it is called."""

    label: str
    stage: int
    #: Parameters of no more elements are whole everywhere.
    small: int = 0
    offload: bool = False
    drawn: bool = True


#: DeepSpeed's stage3_param_persistence_threshold, where nobody gives one.
SMALL = 100_000

#: torch's AdamW in place of DeepSpeed's, which holds the same and is compiled for a minute.
_ANY = "zero_force_ds_cpu_optimizer=false"

STRATEGIES = {
    "ddp": Kind("ddp", 0),
    "deepspeed:stage=0": Kind("stage 0", 0),
    "deepspeed_stage_1": Kind("stage 1", 1),
    "deepspeed_stage_2": Kind("stage 2", 2),
    "deepspeed_stage_3:stage3_param_persistence_threshold=0": Kind("stage 3", 3),
    "deepspeed_stage_3": Kind("stage 3, small whole", 3, SMALL, drawn=False),
    f"deepspeed_stage_2_offload:{_ANY}": Kind("stage 2, offload", 2, offload=True, drawn=False),
    f"deepspeed_stage_3_offload:{_ANY}": Kind(
        "stage 3, offload", 3, SMALL, offload=True, drawn=False
    ),
}

#: Bytes for each parameter: itself, its gradient, and what the optimizer keeps of it.
BYTES = {"32-true": (4, 4, 8), "bf16-mixed": (2, 2, 12)}

#: Of what a GPT is made, and the tokens of a batch. Sizes of the tiny one are odd, so that parts
#: have to be filled up.
SIZES = {"tiny": (63, 33, 1, 1, 7), "medium": (256, 512, 8, 8, 64)}

#: Why more is held than the formula says, or less.
REASONS = {
    "autocast": "under autocast everything is in 32-bit, which has no copy: the sum is the same",
    "early": "at stage 1 gradients are divided as soon as they are reduced, as at stage 2",
    "copy": "a copy of the parameters in 32-bit is stepped, also of parameters in 32-bit",
    "border": "a gradient that lies across the border of two parts is whole in both",
    "small": f"parameters of no more than {SMALL:,} elements are whole beside their parts",
    "host": "gradients are in 32-bit for the step on the host, at stage 3 beside the others",
    "filling": "parts are filled up to one size; counters of steps",
}


def formula(stage: int, ranks: int, parameters: int, precision: str) -> dict[str, float]:
    """Bytes of each part in a rank."""
    per = BYTES[precision]
    divided = (stage >= 3, stage >= 2, stage >= 1)
    return {
        part: parameters * size / (ranks if split else 1)
        for part, size, split in zip(PARTS, per, divided, strict=False)
    }


def differences(
    strategy: str, precision: str, sizes: Sequence[int], ranks: int, rank: int
) -> dict[str, dict[str, float]]:
    """Bytes of each part of a rank beyond the formula, by the names in ``REASONS``.

    Args:
        strategy: one of ``STRATEGIES``.
        precision: one of ``BYTES``.
        sizes: elements of each parameter, in the order of the optimizer.
        ranks: how many there are.
        rank: which of them.
    """
    kind, count = STRATEGIES[strategy], sum(sizes)
    parameter, gradient, state = BYTES[precision]
    share = count / ranks
    found: dict[str, dict[str, float]] = {
        reason: dict.fromkeys(PARTS[:3], 0.0) for reason in REASONS
    }
    if kind.stage == 0:
        found["filling"]["optimizer"] = 4 * len(sizes)
        if strategy == "ddp":
            for part, own, right in zip(PARTS, BYTES["32-true"], BYTES[precision], strict=False):
                found["autocast"][part] = count * (own - right)
        return found
    # Moments, and a copy in 32-bit, whatever the parameters are in.
    stepped = 12
    found["copy"]["optimizer"] = (stepped - state) * share
    if kind.stage == 3:
        part = sum(-(-size // ranks) for size in sizes)
        small = [size for size in sizes if size <= kind.small]
        found["small"]["parameters"] = parameter * sum(small)
        # Whole, they are put together of parts that are filled up.
        put_together = sum(ranks * -(-size // ranks) - size for size in small)
        found["filling"]["parameters"] = parameter * (part - share + put_together)
        kept = gradient
        if kind.offload:
            found["host"]["gradients"] = 4 * share
            kept += 4
    else:
        # One flat tensor, of which each part begins at an even element.
        part = 2 * -(-count // (2 * ranks))
        found["filling"]["parameters"] = parameter * (part * ranks - count)
        kept = gradient
        if kind.offload:
            found["host"]["gradients"] = (4 - gradient) * share
            kept = 4
        else:
            found["border"]["gradients"] = gradient * _outside(sizes, rank * part, part)
        if kind.stage == 1:
            found["early"]["gradients"] = gradient * (share - count)
    found["filling"]["gradients"] = kept * (part - share)
    found["filling"]["optimizer"] = stepped * (part - share) + 4
    return found


def _outside(sizes: Sequence[int], first: int, length: int) -> int:
    """Elements outside of a part, of the parameters that are partly inside."""
    outside = begin = 0
    for size in sizes:
        inside = min(begin + size, first + length) - max(begin, first)
        outside += size - inside if inside > 0 else 0
        begin += size
    return outside


# -- in a rank -------------------------------------------------------------------------------------


def measure(fabric: Any, size: str, steps: int = 2) -> dict[str, Any]:
    """Bytes of each part, ``private`` and ``between``, and the sizes of the parameters."""
    vocabulary, width, depth, heads, context = SIZES[size]
    libc = ctypes.CDLL(None)
    for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: freed memory goes back
        libc.mallopt(option, 1 << 16)
    tokens = torch.randint(vocabulary, (1, context + 1))
    _train(fabric, (vocabulary, context, width, 1, heads), tokens, steps)
    _settle(libc)
    # Kept, so that nothing new has the address of one of them.
    foreign = _living()
    known = set(_storages(foreign))
    before = _private()
    model, optimizer = _train(fabric, (vocabulary, context, width, depth, heads), tokens, steps)
    _settle(libc)
    held = {key: n for key, n in _storages(_living()).items() if key not in known}
    told: dict[str, Any] = {"private": _private() - before}
    counted: set[int] = set()
    for part, tensors in _owned(model, optimizer).items():
        # Gradients may have no Python object until somebody looks.
        mine = {key: n for key, n in _storages(tensors).items() if key not in known | counted}
        counted |= mine.keys()
        told[part] = sum(mine.values())
    told["other"] = sum(n for key, n in held.items() if key not in counted)
    original = fabric.strategy.original(model.prepared)
    told["sizes"] = [getattr(p, "ds_numel", p.numel()) for p in original.parameters()]
    told["count"], told["rank"] = sum(told["sizes"]), fabric.global_rank
    del tensors, held
    optimizer.step()
    optimizer.zero_grad()
    _settle(libc)
    told["between"] = _private() - before
    return told


def _settle(libc: Any) -> None:
    """Give back what nobody has any more; an engine ends when its model is collected."""
    for _ in range(2):
        gc.collect()
    libc.malloc_trim(0)


def _train(fabric: Any, sizes: tuple[int, ...], tokens: Tensor, steps: int) -> tuple[Any, Any]:
    """Steps, of the last of which the backward pass alone."""
    torch.manual_seed(0)
    with fabric.init_module():
        plain = GPT(*sizes)
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
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta:
            storage = tensor.untyped_storage()
            if storage.nbytes():
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


def figures(strategy: str, ranks: int, precision: str, size: str) -> dict[str, Any]:
    """Of the rank that holds most."""
    told = run_ranks(ranks, measure, size, strategy=strategy, precision=precision, timeout=300)
    return max(told, key=lambda each: sum(each[part] for part in PARTS))


HEAD = ["MiB", *PARTS[:3], "sum", "formula", "ratio", "other", "private", "between"]


def rows(results: dict[str, dict[str, Any]], ranks: int, precision: str) -> list[list[str]]:
    shown = []
    for name, found in results.items():
        right = sum(formula(STRATEGIES[name].stage, ranks, found["count"], precision).values())
        mine = sum(found[part] for part in PARTS[:3])
        shown.append(
            [
                STRATEGIES[name].label,
                *(f"{found[part] / MIB:.1f}" for part in PARTS[:3]),
                f"{mine / MIB:.1f}",
                f"{right / MIB:.1f}",
                f"{mine / right:.3f}",
                *(f"{found[each] / MIB:.1f}" for each in ("other", "private", "between")),
            ]
        )
    return shown


WHY = ["sum less formula, MiB", *list(REASONS)[1:-1], "filling, bytes", "unexplained, bytes"]


def why(results: dict[str, dict[str, Any]], ranks: int, precision: str) -> list[list[str]]:
    shown = []
    for name, found in results.items():
        known = differences(name, precision, found["sizes"], ranks, found["rank"])
        sums = {reason: sum(parts.values()) for reason, parts in known.items()}
        right = formula(STRATEGIES[name].stage, ranks, found["count"], precision)
        # By part, so that what is in the wrong one shows too.
        left = [
            found[part] - right[part] - sum(parts[part] for parts in known.values())
            for part in PARTS[:3]
        ]
        shown.append(
            [
                STRATEGIES[name].label,
                *(f"{sums[reason] / MIB:.1f}" for reason in list(REASONS)[1:-1]),
                f"{sums['filling']:.0f}",
                f"{sum(map(abs, left)):.0f}",
            ]
        )
    return shown


def plot(path: str, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Stacked bars by strategy, and the formula as a line over each."""
    import matplotlib

    # The same figures make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "torchweft"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (title, by_ranks) in zip(panels, results.items(), strict=True):
        ranks, precision = title.split(" ranks, ")
        drawn = {k: v for k, v in by_ranks["strategies"].items() if STRATEGIES[k].drawn}
        for x, (name, found) in enumerate(drawn.items()):
            below = 0.0
            for part, colour in zip(PARTS[:3], ("#4c72b0", "#dd8452", "#55a868"), strict=True):
                height = found[part] / MIB
                label = part if x == 0 else None
                axes.bar(x, height, 0.7, below, color=colour, label=label)
                below += height
            right = formula(STRATEGIES[name].stage, int(ranks), found["count"], precision)
            y = sum(right.values()) / MIB
            label = "formula" if x == 0 else None
            axes.plot([x - 0.42, x + 0.42], [y, y], color="black", linewidth=1.5, label=label)
        labels = [STRATEGIES[name].label for name in drawn]
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
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for precision in asked.precision:
        for ranks in asked.ranks:
            found = {name: figures(name, ranks, precision, asked.size) for name in STRATEGIES}
            results[f"{ranks} ranks, {precision}"] = {"strategies": found}
            count = next(iter(found.values()))["count"]
            print(f"\n{ranks} ranks, {precision}, {count / 1e6:.1f} million parameters")
            print(table(HEAD, rows(found, ranks, precision)), end="\n\n")
            print(table(WHY, why(found, ranks, precision)), flush=True)
    print()
    for reason, words in REASONS.items():
        print(f"{reason}: {words}")
    print()
    print(around)
    write(asked.json, {**around, "results": results})
    if asked.plot:
        plot(asked.plot, results)


if __name__ == "__main__":
    main()
