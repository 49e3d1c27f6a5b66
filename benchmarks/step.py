"""What a training step costs beyond the same loop written by hand.

A tiny model, so that what a library adds is not hidden behind the arithmetic. All contestants
train side by side in one process: every round times one block of steps of each, in an order that
rotates, and a ratio is the median over rounds of a contestant's block against the hand-written
one of the same round. The hand-written loop takes part twice; how far the second is from 1 is the
error of the measurement. Each precision has a process of its own, because Accelerate keeps its
precision for the life of a process.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from report import circumstances, installed, spread, table, write
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class Contestant:
    """A way to train: ``step(input, target)``, and the loader that feeds it."""

    step: Callable[[Tensor, Tensor], None]
    loader: Iterable[tuple[Tensor, Tensor]]
    parameters: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Moved:
    """A loader whose batches are moved to the device, as a loop written by hand does."""

    loader: Iterable[tuple[Tensor, ...]]
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for input, target in self.loader:
            yield input.to(self.device), target.to(self.device)


@dataclass(frozen=True)
class Task:
    """What every contestant is given: accelerator, precision and loader the same, model anew."""

    accelerator: str
    precision: str
    data: TensorDataset
    batch: int

    @property
    def device(self) -> torch.device:
        """Where to train."""
        return torch.device(self.accelerator)

    def model(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A small network on the CPU, with the same parameters at each call, and SGD for it."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    def loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches in order, from tensors in memory."""
        return DataLoader(self.data, batch_size=self.batch)


def by_hand(task: Task) -> Contestant:
    device = task.device
    model, optimizer = task.model()
    model.to(device)

    def step(input: Tensor, target: Tensor) -> None:
        loss = nn.functional.cross_entropy(model(input), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def mixed_step(input: Tensor, target: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(input), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    chosen = step if task.precision == "32-true" else mixed_step
    return Contestant(chosen, Moved(task.loader(), device), lambda: list(model.parameters()))


def with_torchweft(task: Task) -> Contestant:
    from torchweft import Fabric

    fabric = Fabric(accelerator=task.accelerator, devices=1, precision=task.precision)
    fabric.launch()
    model, optimizer = fabric.setup(*task.model())
    loader = fabric.setup_dataloaders(task.loader())

    def step(input: Tensor, target: Tensor) -> None:
        loss = nn.functional.cross_entropy(model(input), target)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step, loader, lambda: list(model.parameters()))


def with_lightning(task: Task) -> Contestant:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator=task.accelerator, devices=1, precision=task.precision)
    fabric.launch()
    model, optimizer = fabric.setup(*task.model())
    loader = fabric.setup_dataloaders(task.loader())

    def step(input: Tensor, target: Tensor) -> None:
        loss = nn.functional.cross_entropy(model(input), target)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step, loader, lambda: list(model.parameters()))


def with_accelerate(task: Task) -> Contestant:
    from accelerate import Accelerator

    mixed = "no" if task.precision == "32-true" else "bf16"
    accelerator = Accelerator(cpu=task.accelerator == "cpu", mixed_precision=mixed)
    model, optimizer, loader = accelerator.prepare(*task.model(), task.loader())

    def step(input: Tensor, target: Tensor) -> None:
        loss = nn.functional.cross_entropy(model(input), target)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step, loader, lambda: list(model.parameters()))


#: name -> (distribution that it needs, how to build it); the first is what others are held against
CONTESTANTS: dict[str, tuple[str, Callable[[Task], Contestant]]] = {
    "by hand": ("torch", by_hand),
    "by hand, again": ("torch", by_hand),
    "torchweft": ("torchweft", with_torchweft),
    "Lightning Fabric": ("lightning", with_lightning),
    "Accelerate": ("accelerate", with_accelerate),
}


def block(contestant: Contestant, batches: list[tuple[Tensor, Tensor]] | None) -> None:
    """One step with each of ``batches``, or with each batch of the contestant's own loader."""
    step = contestant.step
    for input, target in contestant.loader if batches is None else batches:
        step(input, target)


def check_same_work(contestants: dict[str, Contestant], precision: str) -> None:
    """Raise where a contestant's parameters are not those of the loop written by hand."""
    expected = [p.detach() for p in contestants["by hand"].parameters()]
    rtol, atol = (1.3e-6, 1e-5) if precision == "32-true" else (0.05, 0.01)
    for name, contestant in contestants.items():
        got = [p.detach() for p in contestant.parameters()]
        torch.testing.assert_close(
            got, expected, rtol=rtol, atol=atol, msg=lambda words, name=name: f"{name}: {words}"
        )


def measure(options: argparse.Namespace, precision: str) -> dict[str, object]:
    """Figures of every installed contestant in one precision."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    count = options.steps * options.batch
    data = TensorDataset(torch.randn(count, 32), torch.randint(10, (count,)))
    task = Task(options.accelerator, precision, data, options.batch)
    contestants = {
        name: build(task) for name, (needs, build) in CONTESTANTS.items() if installed(needs)
    }
    batches = None if options.loader else list(Moved(task.loader(), task.device))
    settle = torch.cuda.synchronize if options.accelerator == "cuda" else nullcontext

    for contestant in contestants.values():
        block(contestant, batches)
        block(contestant, batches)
    check_same_work(contestants, precision)
    gc.collect()
    gc.freeze()

    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for round in range(options.rounds):
        turn = round % len(names)
        for name in names[turn:] + names[:turn]:
            settle()
            start = perf_counter()
            block(contestants[name], batches)
            settle()
            times[name].append(perf_counter() - start)
    base = times["by hand"]
    return {
        name: {
            "microseconds": spread([second / options.steps * 1e6 for second in seconds]),
            "ratio": spread([mine / hand for mine, hand in zip(seconds, base, strict=True)]),
        }
        for name, seconds in times.items()
    }


def in_a_process_of_its_own(precision: str) -> dict[str, dict[str, dict[str, float]]]:
    """What ``measure`` returns, in a fresh interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.json")
        command = [sys.executable, __file__, *sys.argv[1:], "--only", precision]
        subprocess.run([*command, "--json", str(path)], check=True)
        figures: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=16, help="samples in a step")
    parser.add_argument("--steps", type=int, default=20, help="steps in a block")
    parser.add_argument("--rounds", type=int, default=1500, help="blocks of each contestant")
    parser.add_argument("--loader", action="store_true", help="time the data loader too")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    parser.add_argument("--only", choices=PRECISIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        write(options.json, measure(options, options.only))
        return

    results = {precision: in_a_process_of_its_own(precision) for precision in PRECISIONS}
    for precision, figures in results.items():
        rows = [
            [
                name,
                f"{figure['microseconds']['median']:.1f}",
                f"{figure['ratio']['median']:.3f}",
                f"{figure['ratio']['low']:.3f} to {figure['ratio']['high']:.3f}",
            ]
            for name, figure in figures.items()
        ]
        print(table([precision, "us per step", "ratio", "middle half"], rows), end="\n\n")
    write(
        options.json,
        {
            "benchmark": "step",
            **circumstances(),
            "options": {k: v for k, v in vars(options).items() if k not in ("json", "only")},
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
