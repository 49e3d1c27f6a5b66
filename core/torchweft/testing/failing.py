"""Ranks that fail, each in a way of its own, and calls that a strategy refuses."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torchweft.fabric import Fabric
from torchweft.testing.models import Samples, build, loss_of, optimizer_for
from torchweft.testing.training import SEED

__all__ = ["REFUSED", "is_killed", "leaves_out", "leaves_early", "raises", "refused"]


#: Capabilities whose lack is refused, with the strategy's reason, where a user asks for them.
REFUSED = ("setup_apart", "clip_by_norm", "clip_by_value", "no_backward_sync", "several_modules")


def raises(fabric: Fabric) -> None:
    """The last rank raises in the middle of training; the others wait for it."""
    _train_until(fabric)
    if fabric.global_rank == fabric.world_size - 1:
        raise ValueError("this rank has had enough")
    fabric.barrier()


def is_killed(fabric: Fabric) -> None:
    """The last rank is killed; the others wait for it."""
    _train_until(fabric)
    if fabric.global_rank == fabric.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fabric.barrier()


def leaves_early(fabric: Fabric) -> None:
    """The last rank is done while the others wait for it."""
    _train_until(fabric)
    if fabric.global_rank != fabric.world_size - 1:
        fabric.barrier()


def leaves_out(fabric: Fabric, seconds: float) -> None:
    """The last rank does something else while the others wait for it."""
    _train_until(fabric)
    if fabric.global_rank == fabric.world_size - 1:
        time.sleep(seconds)  # the line that is to be named
    fabric.barrier()


def _train_until(fabric: Fabric) -> None:
    """One step, so that whatever a strategy starts lazily has started."""
    plain = build("plain", SEED)
    model, optimizer = fabric.setup(plain, optimizer_for(plain, "sgd"))
    data = Samples(4)
    x, y = fabric.to_device((data.x, data.y))
    fabric.backward(loss_of(model(x), y))
    optimizer.step()


def refused(fabric: Fabric, capability: str) -> None:
    """Do what a strategy says that it cannot."""
    plain = build("plain", SEED)
    optimizer: Any = optimizer_for(plain, "sgd")
    if capability == "setup_apart":
        fabric.setup_module(plain)
        return
    model, optimizer = fabric.setup(plain, optimizer)
    if capability == "several_modules":
        fabric.setup(build("plain", SEED))
    elif capability == "no_backward_sync":
        fabric.no_backward_sync(model)
    else:
        x, y = fabric.to_device((Samples(4).x, Samples(4).y))
        fabric.backward(loss_of(model(x), y))
        limits: Any = {"clip_by_norm": {"max_norm": 0.1}, "clip_by_value": {"clip_val": 0.1}}
        fabric.clip_gradients(model, optimizer, **limits[capability])
