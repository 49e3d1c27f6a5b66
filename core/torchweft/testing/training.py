"""Training through a Fabric in every rank, and the same in plain torch by one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchweft.fabric import Fabric
from torchweft.testing.models import Samples, build, loss_of, optimizer_for

__all__ = ["SEED", "Case", "Expected", "Trained", "alone", "train", "train_all"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training run.

    Attributes:
        model: a name in ``MODELS``.
        optimizer: a name in ``OPTIMIZERS``.
        accumulate: micro-batches in a step.
        clip: how gradients are clipped, hard enough that it matters.
        samples, batch, epochs: of the data; a batch is per replica.
        unsynced: micro-batches are told by ``no_backward_sync`` rather than ``accumulate``.
        apart: model and optimizer are set up in separate calls.
        empty: the model is made under ``init_module()``; where a device draws other numbers than
            the host, it is filled by a checkpoint.
        groups: the optimizer has two parameter groups.
        scheduled: a scheduler halves the learning rate on the way.
        differing: every rank starts from parameters of its own; those of rank 0 count.
        method: the model is trained by ``training_step`` in place of ``forward``.
        keep_grads: ``zero_grad(set_to_none=False)``.
        plain: ``loss.backward()`` in place of ``fabric.backward(loss)``.
    """

    model: str = "plain"
    optimizer: str = "sgd"
    accumulate: int = 1
    clip: Literal["", "norm", "value"] = ""
    samples: int = 24
    batch: int = 4
    epochs: int = 2
    unsynced: bool = False
    apart: bool = False
    empty: bool = False
    groups: bool = False
    scheduled: bool = False
    differing: bool = False
    method: bool = False
    keep_grads: bool = False
    plain: bool = False

    def __str__(self) -> str:
        """What is unusual about it."""
        standard = Case()
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        said = [
            name if value is True else f"{name}={value}"
            for name, value in told.items()
            if value != getattr(standard, name) or name == "optimizer"
        ]
        return ", ".join(said)

    @property
    def needs(self) -> tuple[str, ...]:
        """The capabilities that a strategy may lack."""
        asked = {
            "setup_apart": self.apart,
            "clip_by_norm": self.clip == "norm",
            "clip_by_value": self.clip == "value",
            "no_backward_sync": self.unsynced,
            "unused_parameters": self.model == "unused",
            "frozen_parameters": self.model == "frozen",
            "shared_parameters": self.model == "shared",
            "differing_modules": self.differing,
        }
        return tuple(name for name, asks in asked.items() if asks)

    def clip_arguments(self) -> dict[str, Any]:
        """What ``clip_gradients`` is given."""
        return {"norm": {"max_norm": 0.3}, "value": {"clip_val": 0.02}, "": {}}[self.clip]


@dataclass(kw_only=True)
class Trained:
    """What a rank saw of a case.

    Attributes:
        seen: the samples of each micro-batch.
        losses: of each micro-batch, this rank's own.
        norms: that ``clip_gradients`` returned, of each step.
        output: of the trained model in evaluation, on the same samples in every rank.
        state: the model as a checkpoint holds it; in rank 0 alone.
        trouble: what went wrong instead.
    """

    seen: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    output: Any = None
    state: dict[str, Tensor] = field(default_factory=dict)
    trouble: str = ""


SEED = 11


def train_all(fabric: Fabric, cases: Sequence[Case], folder: Path) -> list[Trained]:
    """One case after another in the same run, each with a model of its own."""
    return [train(fabric, case, folder / f"{i}.ckpt") for i, case in enumerate(cases)]


def train(fabric: Fabric, case: Case, path: Path) -> Trained:
    """Train as a user's script does, in this rank."""
    told = Trained()
    data = Samples(case.samples)
    seed = SEED + (fabric.global_rank if case.differing else 0)
    with fabric.init_module() if case.empty else nullcontext():
        plain = build(case.model, seed)
    optimizer = optimizer_for(plain, case.optimizer, case.groups)
    scheduler = _scheduler(optimizer) if case.scheduled else None
    if case.apart:
        model = fabric.setup_module(plain)
        optimizer = fabric.setup_optimizers(optimizer)
    elif scheduler is not None:
        model, optimizer, scheduler = fabric.setup(plain, optimizer, scheduler=scheduler)
    else:
        model, optimizer = fabric.setup(plain, optimizer)
    if case.empty and not fabric.accelerator.host_memory:
        _fill(fabric, model, build(case.model, seed), path.with_suffix(".first.ckpt"))
    if case.method:
        model.mark_forward_method("training_step")
    call = model.training_step if case.method else model
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=case.batch))
    for _ in range(case.epochs):
        for i, (index, x, y) in enumerate(loader):
            told.seen.append(index.tolist())
            last = (i + 1) % case.accumulate == 0 or i + 1 == len(loader)
            with _micro_batch(fabric, model, case, i, len(loader), last):
                loss = loss_of(call(x, branch=fabric.global_rank), y)
                group = _group_size(i, case.accumulate, len(loader))
                backward = Tensor.backward if case.plain else fabric.backward
                backward(loss / group)
            told.losses.append(loss.item())
            if not last:
                continue
            if case.clip:
                norm = fabric.clip_gradients(model, optimizer, **case.clip_arguments())
                told.norms += [] if norm is None else [float(norm)]
            optimizer.step()
            optimizer.zero_grad(set_to_none=not case.keep_grads)
            if scheduler is not None:
                scheduler.step()
    model.eval()
    with torch.no_grad():
        told.output = model(fabric.to_device(data.x)).float()
    fabric.save(path, {"model": model})
    if fabric.global_rank == 0:
        told.state = torch.load(path, weights_only=True)["model"]
    fabric.barrier()
    return told


def _fill(fabric: Fabric, model: Any, made: nn.Module, path: Path) -> None:
    """Give a model the parameters and buffers of one that the host has made."""
    if fabric.global_rank == 0:
        torch.save({"model": made.state_dict()}, path)
    fabric.barrier()
    fabric.load(path, {"model": model})


def _micro_batch(fabric: Fabric, model: Any, case: Case, i: int, total: int, last: bool) -> Any:
    if case.unsynced:
        return fabric.no_backward_sync(model, enabled=not last)
    return fabric.accumulate(model, steps=case.accumulate, index=i, total=total)


def _group_size(i: int, steps: int, total: int) -> int:
    first = i - i % steps
    return min(steps, total - first)


def _scheduler(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


# -- the truth -------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Expected:
    """What one process computes in float64 on the batches that all ranks saw.

    Attributes:
        losses: by rank, of each micro-batch.
        steps: for each micro-batch, which step it closes; None where it closes none.
        norms: the global norm before clipping, of each step.
        model: trained.
    """

    losses: list[list[float]]
    steps: list[int | None]
    norms: list[float]
    model: nn.Module


def alone(case: Case, seen: Sequence[Sequence[Sequence[int]]]) -> Expected:
    """The case without torchweft, in one process; ``seen``: by rank, each micro-batch's samples.

    The loss of a micro-batch is the mean of the ranks' losses, which is what data parallelism
    means where every rank's batch is equally large.
    """
    data = Samples(case.samples)
    model = build(case.model, SEED).double()
    optimizer = optimizer_for(model, case.optimizer, case.groups)
    scheduler = _scheduler(optimizer) if case.scheduled else None
    call = model.training_step if case.method else model
    expected = Expected(losses=[[] for _ in seen], steps=[], norms=[], model=model)
    done = 0
    per_epoch = len(seen[0]) // case.epochs
    for step in range(len(seen[0])):
        i = step % per_epoch
        total = torch.zeros((), dtype=torch.float64)
        for rank, batches in enumerate(seen):
            index = torch.tensor(batches[step])
            loss = loss_of(call(data.x[index].double(), branch=rank), data.y[index].double())
            expected.losses[rank].append(loss.item())
            total = total + loss / len(seen)
        (total / _group_size(i, case.accumulate, per_epoch)).backward()  # type: ignore[no-untyped-call]
        if (i + 1) % case.accumulate and i + 1 < per_epoch:
            expected.steps.append(None)
            continue
        expected.steps.append(done)
        done += 1
        if case.clip == "norm":
            norm = nn.utils.clip_grad_norm_(model.parameters(), case.clip_arguments()["max_norm"])
            expected.norms.append(norm.item())
        elif case.clip == "value":
            nn.utils.clip_grad_value_(model.parameters(), case.clip_arguments()["clip_val"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=not case.keep_grads)
        if scheduler is not None:
            scheduler.step()
    return expected
