"""Training on global batches that do not depend on the world, so that any world can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from torchweft.fabric import Fabric
from torchweft.testing.models import Samples, build, loss_of, optimizer_for

__all__ = ["SAVED_AT", "STEPS", "plain_losses", "train_on"]

#: Divisible by every number of replicas that tests use.
GLOBAL_BATCH = 24
#: Steps in all, and those done when the checkpoint is written.
STEPS, SAVED_AT = 7, 3
_SEED = 5


def train_on(
    fabric: Fabric, optimizer: str, load: Path | None, save: Path | None
) -> dict[str, Any]:
    """The steps before the checkpoint is written and those after it, or the latter alone.

    ``save`` names the checkpoint of one file; without its suffix it names that of a folder.

    Returns this process's ``losses`` by step, and in rank 0 the ``names`` and ``shapes`` that the
    checkpoint holds of the model, and the ``states`` by parameter of the optimizer.
    """
    # What is loaded has to come out of the file and not out of an equal seed.
    plain = build("plain", _SEED if load is None else _SEED + 1)
    plain_optimizer = optimizer_for(plain, optimizer, groups=True)
    decay = torch.optim.lr_scheduler.ExponentialLR(plain_optimizer, gamma=0.8)
    model, ready, scheduler = fabric.setup(plain, plain_optimizer, scheduler=decay)
    objects = {"model": model, "optimizer": ready, "scheduler": scheduler}
    first = 0
    if load is not None:
        first = fabric.load(load, objects)["step"]
    shard = fabric.strategy.shard
    each = GLOBAL_BATCH // shard.replicas
    mine = slice(shard.first * each, (shard.first + shard.count) * each)
    data = Samples(2 * GLOBAL_BATCH)
    told: dict[str, Any] = {"losses": {}}
    for step, indices in zip(range(STEPS), data.batches(GLOBAL_BATCH), strict=False):
        if step < first:
            continue
        index = list(indices)[mine]
        x, y = fabric.to_device((data.x[index], data.y[index]))
        loss = loss_of(model(x), y)
        fabric.backward(loss)
        ready.step()
        ready.zero_grad()
        scheduler.step()
        told["losses"][step] = loss.item()
        if save is not None and step + 1 == SAVED_AT:
            for path in (save, save.with_suffix("")):
                fabric.save(path, {**objects, "step": SAVED_AT})
            if fabric.global_rank == 0:
                told.update(_content(save))
    return told


def _content(path: Path) -> dict[str, Any]:
    content = torch.load(path, weights_only=True)
    model, optimizer = content["model"], content["optimizer"]
    return {
        "names": list(model),
        "shapes": {name: tuple(value.shape) for name, value in model.items()},
        "states": sorted(optimizer.get("state", {}), key=str),
    }


def plain_losses(optimizer: str) -> list[float]:
    """The same by one process, in float64 and without an interruption."""
    model = build("plain", _SEED).double()
    plain = optimizer_for(model, optimizer, groups=True)
    decay = torch.optim.lr_scheduler.ExponentialLR(plain, gamma=0.8)
    data = Samples(2 * GLOBAL_BATCH)
    losses = []
    for _, indices in zip(range(STEPS), data.batches(GLOBAL_BATCH), strict=False):
        loss = loss_of(model(data.x[list(indices)].double()), data.y[list(indices)].double())
        loss.backward()  # type: ignore[no-untyped-call]
        plain.step()
        plain.zero_grad()
        decay.step()
        losses.append(loss.item())
    return losses
