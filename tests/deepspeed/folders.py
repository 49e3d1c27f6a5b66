"""What ranks do in the tests of DeepSpeed's own folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.deepspeed.ranks import data_of
from torchweft.errors import CheckpointError
from torchweft.testing.models import build, loss_of, optimizer_for


def set_up(fabric: Any, seed: int, optimizer: str = "adamw") -> tuple[Any, Any, Any]:
    """A model with shared and frozen parameters and buffers, two groups and a scheduler."""
    plain = build("shared", seed)
    plain.register_buffer("counts", torch.full((3,), float(seed)))
    plain.out.bias.requires_grad_(False)
    made = optimizer_for(plain, optimizer, groups=True)
    decay = torch.optim.lr_scheduler.ExponentialLR(made, gamma=0.8)
    return tuple(fabric.setup(plain, made, scheduler=decay))  # type: ignore[return-value]


def steps(fabric: Any, model: Any, optimizer: Any, scheduler: Any, number: int) -> list[float]:
    x, y = data_of(fabric)
    losses = []
    for _ in range(number):
        loss = loss_of(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(float(fabric.all_reduce(loss.detach().clone())))
    return losses


def saves(fabric: Any, path: Path) -> list[float]:
    """Losses behind the checkpoint, of which there is a folder and a file."""
    model, optimizer, scheduler = set_up(fabric, 3)
    steps(fabric, model, optimizer, scheduler, 3)
    state = {"parts": [model, {"optimizer": optimizer}], "scheduler": scheduler, "step": 3}
    fabric.save(path, state)
    fabric.save(path, state)  # the one before is replaced
    fabric.save(path.with_suffix(".ckpt"), state)
    return steps(fabric, model, optimizer, scheduler, 3)


def goes_on(fabric: Any, path: Path) -> list[float]:
    """The same from either, in an engine that has trained something else."""
    model, optimizer, scheduler = set_up(fabric, 4)
    steps(fabric, model, optimizer, scheduler, 2)
    state = {"parts": [model, {"optimizer": optimizer}], "scheduler": scheduler, "step": 0}
    fabric.load(path, state)
    assert state["step"] == 3
    assert model.module.counts.tolist() == [3.0] * 3
    return steps(fabric, model, optimizer, scheduler, 3)


def loads_the_model(fabric: Any, path: Path) -> list[str]:
    """The model alone, its optimizer staying what it was; returns what is left over."""
    model, optimizer, scheduler = set_up(fabric, 4)
    steps(fabric, model, optimizer, scheduler, 2)
    before = fabric.strategy.optimizer_state(optimizer.optimizer, [model.prepared])
    parts: list[Any] = [model, {"optimizer": None}]
    left = fabric.load(path, {"parts": parts})
    after = fabric.strategy.optimizer_state(optimizer.optimizer, [model.prepared])
    assert str(before) == str(after)
    saved = torch.load(path.with_suffix(".ckpt"), weights_only=True)["parts"][0]
    for name, value in fabric.strategy.module_state(model.prepared):
        if not value.is_meta:
            torch.testing.assert_close(value, saved[name])
    # What others may do with it is to be seen, and to look for where it is.
    assert steps(fabric, model, optimizer, scheduler, 1)
    return [*sorted(left), str(parts[1]["optimizer"])]


def is_refused(fabric: Any, path: Path, what: str) -> str:
    """The words in which a load is."""
    model, optimizer, _ = set_up(fabric, 4, "momentum" if what == "another optimizer" else "adamw")
    parts: list[Any] = [model, {"optimizer": optimizer}]
    if what == "another model":
        other = nn.Linear(6, 4)
        parts[0], parts[1]["optimizer"] = fabric.setup(other, optimizer_for(other, "adamw"))
    elif what == "the optimizer alone":
        parts[0] = None
    elif what == "another's optimizer":
        parts[0] = set_up(fabric, 5)[0]
    elif what == "not set up":
        parts[0] = build("shared", 3)
    with pytest.raises(CheckpointError) as error:
        fabric.load(path, {"parts": parts})
    return str(error.value)


def two(fabric: Any, path: Path, load: bool) -> list[float]:
    """A generator and a critic, and a third model that is saved without its optimizer."""
    made = [set_up(fabric, seed + 10 * load) for seed in (1, 2, 3)]
    one, other, third = made
    state: dict[str, Any] = {
        "a/b": one[0],
        "a.b": other[0],
        "optimizers": [one[1], other[1]],
        "third": third[0],
        "again": one[0],
    }
    if load:
        fabric.load(path, state)
    else:
        for each in made:
            steps(fabric, *each, 2)
        fabric.save(path, state)
    return [float(value.sum()) for each in made for value in [each[0](data_of(fabric)[0])]]


def fails_to_write(fabric: Any, path: Path) -> str:
    """One rank's disk is full in the middle of it."""
    model, optimizer, _ = set_up(fabric, 3)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    if fabric.global_rank == 1:
        real = torch.save

        def full(content: Any, file: Any, **keywords: Any) -> None:
            if "zero_pp_rank_1" in getattr(file, "name", ""):
                raise OSError(28, os.strerror(28))
            real(content, file, **keywords)

        torch.save = full
    with pytest.raises(CheckpointError) as error:
        fabric.save(path, {"model": model, "optimizer": optimizer, "more": 1})
    # The one before is there, and whole.
    assert fabric.load(path, {"model": model, "optimizer": optimizer}) == {}
    return str(error.value)


def cannot_filter(fabric: Any, path: Path) -> str:
    model, optimizer, _ = set_up(fabric, 3)
    with pytest.raises(CheckpointError) as error:
        fabric.save(
            path,
            {"model": model, "optimizer": optimizer},
            filter={"model": lambda name, value: True},
        )
    return str(error.value)


def filters(fabric: Any, path: Path) -> list[str]:
    """A model alone is written by its names, of which some may be kept."""
    model, _, _ = set_up(fabric, 3)
    fabric.save(path, {"model": model}, filter={"model": lambda name, value: "bias" in name})
    return list(fabric.load(path)["model"])


# -- DeepSpeed by itself ---------------------------------------------------------------------------


def by_deepspeed(fabric: Any, path: Path, config: dict[str, Any]) -> list[float]:
    """Losses of a script that calls DeepSpeed itself, behind a checkpoint of two steps."""
    import deepspeed

    plain = build("plain", 3)
    engine, *_ = deepspeed.initialize(
        model=plain, optimizer=optimizer_for(plain, "adamw"), config=config
    )
    x, y = data_of(fabric)
    losses = []
    for step in range(5):
        if step in (1, 2):
            engine.save_checkpoint(str(path), client_state={"epoch": step})
        loss = loss_of(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(float(fabric.all_reduce(loss.detach().clone())))
    engine.destroy()
    return losses[2:]


def goes_on_from_deepspeed(fabric: Any, path: Path) -> tuple[dict[str, Any], list[float]]:
    plain = build("plain", 4)
    model, optimizer = fabric.setup(plain, optimizer_for(plain, "adamw"))
    rest = fabric.load(path, {"model": model, "optimizer": optimizer})
    x, y = data_of(fabric)
    losses = []
    for _ in range(3):
        loss = loss_of(model(x), y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(fabric.all_reduce(loss.detach().clone())))
    return rest, losses
