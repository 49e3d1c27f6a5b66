"""What strategy ``fsdp`` costs beyond ``fully_shard`` by hand: time of a step, memory of a rank.

Time: all contestants train a GPT side by side in one set of ranks, each a model of its own from
the same parameters, with AdamW, gradients clipped by their norm. A round times one block of steps
of each, in an order that rotates, from a barrier to the end of the slowest rank; a ratio is the
median over rounds of a contestant's block against that of the hand-written loop in the same round.
That loop takes part twice; how far the second is from 1 is the error of the measurement. The ratio
of processor time, of all ranks together, is disturbed less by what else the machine does. Before
anything is timed, parameters are compared with those of the hand-written loop. A peer that cannot
take part is left out, with the reason it gives.

Memory (``--memory``): each contestant alone in a set of fresh ranks, of which the largest counts.
"Held" are the bytes of parameters, gradients and optimizer state after a step; "peak" is how much
more memory than before the model was made the rank has had at any time, its activations and the
whole model that it started from included. On the CPU that is resident memory, with glibc told to
give back what is freed, which it does not do by default. A tiny model is trained before, so that
what is imported or allocated once does not count.
"""

import argparse
import gc
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
from report import bars, circumstances, installed, spread, table, write
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

sys.path.append(str(Path(__file__).parents[1] / "examples" / "language_model"))
from gpt import GPT, Block

PRECISIONS = ("32-true", "bf16-mixed")
MAX_NORM = 1.0
MIB = 2**20

#: glibc gives freed memory back to the system at once. By default it keeps most of it, and after a
#: few steps a rank would seem to hold all that it ever gathered.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

#: What a size stands for; flags given beside it count.
SIZES = {
    "small": {
        "vocabulary": 256,
        "width": 128,
        "heads": 4,
        "depth": 4,
        "context": 64,
        "batch": 4,
        "precision": list(PRECISIONS),
    },
    "medium": {
        "vocabulary": 256,
        "width": 512,
        "heads": 8,
        "depth": 8,
        "context": 64,
        "batch": 1,
        "precision": ["32-true"],
    },
    # 16 blocks of 12 width², and twice vocabulary x width: 1.0e9 parameters.
    "1b": {
        "vocabulary": 50304,
        "width": 2048,
        "heads": 16,
        "depth": 16,
        "context": 1024,
        "batch": 2,
        "precision": ["bf16-mixed"],
    },
}


@dataclass(frozen=True)
class Contestant:
    """A way to train: ``step(input, target)``, and what trains."""

    step: Callable[[Tensor, Tensor], None]
    model: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Task:
    """What every contestant is given: accelerator, precision and sizes the same, model anew."""

    accelerator: str
    precision: str
    vocabulary: int
    width: int
    heads: int
    depth: int
    context: int
    batch: int

    @property
    def device(self) -> torch.device:
        """Where this rank trains."""
        index = None if self.accelerator == "cpu" else int(os.environ["LOCAL_RANK"])
        return torch.device(self.accelerator, index)

    def model(self) -> GPT:
        """A GPT on the device, with the same parameters at each call."""
        torch.manual_seed(0)
        with self.device:
            return GPT(self.vocabulary, self.context, self.width, self.depth, self.heads)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW, small updates, so that differences of rounding stay small."""
        return torch.optim.AdamW(model.parameters(), lr=1e-4)

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """This rank's part of some random text, on the device."""
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        shape = (count, self.batch, self.context + 1)
        tokens = torch.randint(self.vocabulary, shape, generator=generator).to(self.device)
        return [(each[:, :-1], each[:, 1:]) for each in tokens]


def loss_of(model: Callable[[Tensor], Tensor], input: Tensor, target: Tensor) -> Tensor:
    logits = model(input).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def shard_by_hand(task: Task, model: GPT, mesh: DeviceMesh) -> GPT:
    # torch's default: blocks are freed after their forward pass, what the root holds stays.
    options: dict[str, Any] = {"mesh": mesh}
    if task.precision == "bf16-mixed":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    for part in model.blocks:
        fully_shard(part, **options)
    fully_shard(model, **options)
    return model


def by_hand(task: Task) -> Contestant:
    mesh = init_device_mesh(task.accelerator, (dist.get_world_size(),))
    model = shard_by_hand(task, task.model(), mesh)
    optimizer = task.optimizer(model)
    parameters = list(model.parameters())

    def step(input: Tensor, target: Tensor) -> None:
        loss_of(model, input, target).backward()
        norm = get_total_norm([p.grad for p in parameters])
        clip_grads_with_norm_(parameters, MAX_NORM, norm.full_tensor())
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step, model, optimizer)


def with_torchweft(task: Task, strategy: str = "fsdp:policy=Block") -> Contestant:
    from torchweft import Fabric

    fabric = Fabric(
        accelerator=task.accelerator,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=strategy,
        precision=task.precision,
    )
    fabric.launch()
    model = task.model()
    model, optimizer = fabric.setup(model, task.optimizer(model))

    def step(input: Tensor, target: Tensor) -> None:
        fabric.backward(loss_of(model, input, target))
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step, model, optimizer)


def with_torchweft_ddp(task: Task) -> Contestant:
    return with_torchweft(task, "ddp")


def with_lightning(task: Task) -> Contestant:
    from lightning.fabric.strategies import FSDPStrategy

    return _with_lightning(task, FSDPStrategy(auto_wrap_policy={Block}))


def with_lightning_by_hand(task: Task) -> Contestant:
    from lightning.fabric.strategies import ModelParallelStrategy

    def shard(model: GPT, mesh: DeviceMesh) -> GPT:
        return shard_by_hand(task, model, mesh["data_parallel"])

    ranks = dist.get_world_size()
    return _with_lightning(
        task, ModelParallelStrategy(shard, data_parallel_size=ranks, tensor_parallel_size=1)
    )


def _with_lightning(task: Task, strategy: Any) -> Contestant:
    from lightning.fabric import Fabric

    fabric = Fabric(
        accelerator=task.accelerator,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=strategy,
        precision=task.precision,
    )
    fabric.launch()
    model = fabric.setup_module(task.model())
    optimizer = fabric.setup_optimizers(task.optimizer(model))

    def step(input: Tensor, target: Tensor) -> None:
        fabric.backward(loss_of(model, input, target))
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step, model, optimizer)


def with_accelerate(task: Task) -> Contestant:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )
    mixed = "no" if task.precision == "32-true" else "bf16"
    accelerator = Accelerator(
        cpu=task.accelerator == "cpu", mixed_precision=mixed, fsdp_plugin=plugin
    )
    if accelerator.distributed_type != DistributedType.FSDP:
        raise RuntimeError(
            f"asked for FSDP, it makes {accelerator.distributed_type} of these ranks, which does "
            "not shard"
        )
    model = task.model()
    model, optimizer = accelerator.prepare(model, task.optimizer(model))

    def step(input: Tensor, target: Tensor) -> None:
        accelerator.backward(loss_of(model, input, target))
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step, model, optimizer)


#: name -> (distribution that it needs, how to build it); the first is what others are held against
TIMED: dict[str, tuple[str, Callable[[Task], Contestant]]] = {
    "by hand": ("torch", by_hand),
    "by hand, again": ("torch", by_hand),
    "torchweft": ("torchweft-cuda", with_torchweft),
    "Lightning Fabric": ("lightning", with_lightning),
    "Lightning Fabric, fully_shard by hand": ("lightning", with_lightning_by_hand),
    "Accelerate": ("accelerate", with_accelerate),
}
#: Distributions whose failure is a failure of the benchmark; a peer's is a note.
OURS = ("torch", "torchweft-cuda")

WEIGHED: dict[str, Callable[[Task], Contestant]] = {
    "by hand": by_hand,
    "torchweft": with_torchweft,
    "torchweft, ddp": with_torchweft_ddp,
}


# -- in a rank -----------------------------------------------------------------------------------


def of_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def settle(task: Task) -> None:
    """Return when the device has done all it was given."""
    if task.accelerator == "cuda":
        torch.cuda.synchronize()


def whole(model: nn.Module) -> Iterator[Tensor]:
    """The parameters, put together from all ranks one by one."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FirstForm

    # Does nothing where no part of the model is in that form, as a peer may have it.
    with FirstForm.summon_full_params(model, writeback=False):
        for parameter in model.parameters():
            value = parameter.detach()
            yield value.full_tensor() if isinstance(value, DTensor) else value


def drift(contestant: Contestant, hand: Contestant, task: Task) -> float:
    """How far parameters are from those by hand, as a part of how far those have come."""
    apart = moved = 0.0
    start = (parameter.detach() for parameter in task.model().parameters())
    for mine, other, first in zip(whole(contestant.model), whole(hand.model), start, strict=True):
        apart += float((mine - other).square().sum())
        moved += float((other - first).square().sum())
    return math.sqrt(apart / moved)


def block(contestant: Contestant, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    for input, target in batches:
        contestant.step(input, target)


def enter(task: Task, batches: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Any], list[str]]:
    """The contestants after two blocks, and why others do not take part."""
    contestants: dict[str, Contestant] = {}
    notes = []
    for name, (needs, build) in TIMED.items():
        if not installed(needs):
            continue
        reason = None
        try:
            contestant = build(task)
            block(contestant, batches)
            block(contestant, batches)
        except Exception as error:
            if needs in OURS:
                raise
            reason = f"{name}: {error}"
        reasons = [each for each in of_all_ranks(reason) if each]
        if reasons:
            notes.append(reasons[0])
        else:
            contestants[name] = contestant
    return contestants, notes


def compare(task: Task, steps: int, rounds: int) -> dict[str, object]:
    """Figures of all contestants, the same in every rank."""
    batches = task.batches(steps)
    contestants, notes = enter(task, batches)
    # bfloat16 has 8 bits, and the first updates of Adam are little more than signs.
    allowed = 0.001 if task.precision == "32-true" else 0.2
    drifts = {name: drift(each, contestants["by hand"], task) for name, each in contestants.items()}
    for name, value in drifts.items():
        if value <= allowed:
            continue
        reason = f"{name}: its parameters are not those of the loop by hand, drift {value:.2g}"
        if TIMED[name][0] in OURS:
            raise RuntimeError(reason)
        del contestants[name]
        notes.append(reason)
    gc.collect()
    gc.freeze()

    names = list(contestants)
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    for round in range(rounds):
        turn = round % len(names)
        for name in names[turn:] + names[:turn]:
            settle(task)
            dist.barrier()
            start = perf_counter(), process_time()
            block(contestants[name], batches)
            settle(task)
            wall[name].append(perf_counter() - start[0])
            processor[name].append(process_time() - start[1])
    slowest = _over_ranks(wall, max)
    together = _over_ranks(processor, sum)
    return {
        "notes": notes,
        "parameters": sum(parameter.numel() for parameter in task.model().parameters()),
        "contestants": {
            name: {
                "milliseconds": spread([second / steps * 1e3 for second in slowest[name]]),
                "ratio": _ratios(slowest[name], slowest["by hand"]),
                "processor_ratio": _ratios(together[name], together["by hand"]),
                "drift": drifts[name],
            }
            for name in names
        },
    }


def _over_ranks(
    times: dict[str, list[float]], merge: Callable[[Iterable[float]], float]
) -> dict[str, list[float]]:
    ranks = of_all_ranks(times)
    return {
        name: [merge(block) for block in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in times
    }


def _ratios(mine: Sequence[float], hand: Sequence[float]) -> dict[str, float]:
    return spread([one / other for one, other in zip(mine, hand, strict=True)])


def held(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state that are in this process."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for each in parameters for value in optimizer.state[each].values()]
    return {
        "parameters": _bytes(parameters),
        "gradients": _bytes(each.grad for each in parameters),
        "optimizer": _bytes(value for value in state if isinstance(value, Tensor)),
    }


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    local = (each.to_local() if isinstance(each, DTensor) else each for each in tensors)
    return sum(each.numel() * each.element_size() for each in local if each is not None)


def resident(field: str) -> int:
    """Bytes that Linux counts for this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(f"{field}:"))
    return int(found.split()[1]) * 1024


def start_peak(task: Task) -> int:
    """Forget how much memory was used at most; returns how much is used now."""
    gc.collect()
    if task.accelerator == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(task: Task) -> int:
    """How much memory was used at most."""
    return torch.cuda.max_memory_allocated() if task.accelerator == "cuda" else resident("VmHWM")


def weigh(task: Task, steps: int, build: Callable[[Task], Contestant]) -> dict[str, int]:
    """Bytes of the rank that needs most."""
    tiny = replace(task, width=8 * task.heads, depth=1)
    block(build(tiny), tiny.batches(2))
    before = start_peak(task)
    contestant = build(task)
    found: dict[str, int] = {}
    # After the step and before gradients are forgotten.
    contestant.optimizer.register_step_post_hook(
        lambda optimizer, *_: found.update(held(optimizer))
    )
    block(contestant, task.batches(steps))
    settle(task)
    mine = {**found, "held": sum(found.values()), "peak": peak(task) - before}
    ranks = of_all_ranks(mine)
    return {name: max(rank[name] for rank in ranks) for name in mine}


def work(options: argparse.Namespace) -> None:
    """What a rank does; rank 0 writes the figures."""
    torch.set_num_threads(1)
    task = task_of(options, options.rank_of)
    if task.accelerator == "cuda":
        torch.cuda.set_device(task.device)
        dist.init_process_group("nccl", device_id=task.device)
    else:
        dist.init_process_group("gloo")
    if options.alone:
        figures: dict[str, object] = dict(weigh(task, options.steps, WEIGHED[options.alone]))
    else:
        figures = compare(task, options.steps, options.rounds)
    if dist.get_rank() == 0:
        write(options.json, figures)
    dist.barrier()
    dist.destroy_process_group()


def work_and_end(options: argparse.Namespace) -> None:
    """Work, and leave without the destructors of what was sharded: they may wait for others."""
    status = 1
    try:
        work(options)
        status = 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# -- around the ranks ----------------------------------------------------------------------------


def task_of(options: argparse.Namespace, precision: str) -> Task:
    names = ("vocabulary", "width", "heads", "depth", "context", "batch")
    return Task(options.accelerator, precision, **{name: getattr(options, name) for name in names})


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def in_ranks(count: int, precision: str, alone: str | None = None) -> dict[str, Any]:
    """What rank 0 of a fresh set of ranks writes, started by torchrun; ``alone``: whom to weigh."""
    # Without written bytecode every rank would compile what it imports.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environ["OMP_NUM_THREADS"] = "1"
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:
        environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    if alone:
        environ |= GIVES_BACK
    port = ["--master-port", str(free_port())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.json")
        rank = [__file__, *sys.argv[1:], "--rank-of", precision, "--json", str(path)]
        rank += ["--alone", alone] if alone else []
        if subprocess.run([*torchrun, *port, *rank], env=environ, check=False).returncode != 0:
            raise SystemExit(f"the benchmark failed in {ranks(count)}")
        figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def times(options: argparse.Namespace) -> dict[str, Any]:
    """Times a step at every number of ranks and precision."""
    results = {}
    for count in options.ranks:
        for precision in options.precision:
            title = f"{ranks(count)}, {precision}"
            found = results[title] = in_ranks(count, precision)
            rows = [
                [
                    name,
                    f"{figure['milliseconds']['median']:.1f}",
                    f"{figure['ratio']['median']:.3f}",
                    f"{figure['ratio']['low']:.3f} to {figure['ratio']['high']:.3f}",
                    f"{figure['processor_ratio']['median']:.3f}",
                ]
                for name, figure in found["contestants"].items()
            ]
            head = [title, "ms per step", "ratio", "middle half", "ratio of processor time"]
            print(table(head, rows))
            for note in found["notes"]:
                print(f"Left out: {note}")
            print(flush=True)
    if options.plot:
        bars(
            options.plot,
            {
                "time of a step / by hand": {
                    title: {n: f["ratio"]["median"] for n, f in found["contestants"].items()}
                    for title, found in results.items()
                }
            },
        )
    return results


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Weighs every contestant at every number of ranks and precision."""
    results: dict[str, Any] = {}
    parts = ("parameters", "gradients", "optimizer", "held", "peak")
    for precision in options.precision:
        for count in options.ranks:
            title = f"{ranks(count)}, {precision}"
            found = results[title] = {name: in_ranks(count, precision, name) for name in WEIGHED}
            rows = [
                [name, *(f"{figure[part] / MIB:.1f}" for part in parts)]
                for name, figure in found.items()
            ]
            print(table([f"{title}, MiB of a rank", *parts], rows), end="\n\n", flush=True)
    if options.plot:
        bars(
            options.plot,
            {
                "MiB of a rank": {
                    title: {
                        f"{name}, {part}": figure[part] / MIB
                        for name, figure in found.items()
                        for part in ("held", "peak")
                    }
                    for title, found in results.items()
                }
            },
        )
    return results


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", help="2; with --memory 1, 2 and 4")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", help="as of the size")
    parser.add_argument("--size", choices=SIZES, help="small; with --memory medium")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--depth", type=int, help="blocks")
    parser.add_argument("--context", type=int, help="tokens of a sample")
    parser.add_argument("--batch", type=int, help="samples of a rank in a step")
    parser.add_argument("--steps", type=int, default=4, help="steps in a block")
    parser.add_argument("--rounds", type=int, default=60, help="blocks of each contestant")
    parser.add_argument("--memory", action="store_true", help="weigh in place of timing")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    parser.add_argument("--plot", metavar="PATH", help="draw them there; needs matplotlib")
    parser.add_argument("--rank-of", choices=PRECISIONS, help=argparse.SUPPRESS)
    parser.add_argument("--alone", choices=WEIGHED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plot and not installed("matplotlib"):
        parser.error("--plot needs matplotlib; try: pip install matplotlib")
    options.size = options.size or ("medium" if options.memory else "small")
    options.ranks = options.ranks or ([1, 2, 4] if options.memory else [2])
    for name, value in SIZES[options.size].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parsed()
    if options.rank_of:
        work_and_end(options)
    results = memory(options) if options.memory else times(options)
    hidden = ("json", "plot", "rank_of", "alone")
    write(
        options.json,
        {
            "benchmark": "sharding",
            **circumstances(),
            "options": {k: v for k, v in vars(options).items() if k not in hidden},
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
