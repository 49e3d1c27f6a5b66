"""What an optimizer says of its state where DeepSpeed holds it, and the way to all of it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.deepspeed import ranks
from torchweft.errors import Misuse
from torchweft.testing import run_ranks
from torchweft.testing.models import Samples, build, loss_of, optimizer_for

HELD = [
    ("deepspeed:stage=0", "bf16-mixed"),
    ("deepspeed_stage_1", "32-true"),
    ("deepspeed_stage_2", "bf16-mixed"),
    ("deepspeed_stage_3", "32-true"),
]


def _step(fabric: Any) -> tuple[Any, Any]:
    model, optimizer = ranks.set_up(fabric)
    x, y = ranks.data_of(fabric)
    fabric.backward(loss_of(model(x), y))
    optimizer.step()
    return model, optimizer


def asks(fabric: Any, path: Path) -> tuple[list[str], int]:
    """What the two calls say behind a step, and of how many parameters the original has a state."""
    model, optimizer = _step(fabric)
    said = []
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        try:
            call()
        except Misuse as error:
            said.append(str(error))
    fabric.save(path, {"model": model, "optimizer": optimizer})
    return said, len(optimizer.optimizer.state_dict()["state"])


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("strategy", "precision"), HELD)
def test_a_state_that_deepspeed_holds(
    devices: int, strategy: str, precision: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    for said, parameters in run_ranks(devices, asks, path, strategy=strategy, precision=precision):
        # It would have been an empty one.
        assert parameters == 0
        words = (
            "optimizer.{} was called, and with strategy 'deepspeed' this AdamW does not hold its "
            "whole state; call fabric.{}(path, {{'model': model, 'optimizer': optimizer}}) in "
            "every process"
        )
        assert said == [
            words.format("state_dict()", "save"),
            words.format("load_state_dict(…)", "load"),
        ]
    # What the words name holds all of it.
    saved = torch.load(path, weights_only=True)["optimizer"]["state"]
    model = build("plain", 3)
    assert saved.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert saved[name]["exp_avg"].shape == parameter.shape
        assert saved[name]["exp_avg"].abs().sum() > 0


def hands_over(fabric: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """State and parameters behind one step, and the parameters behind a second."""
    model, optimizer = _step(fabric)
    state = deepcopy({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
    x, y = ranks.data_of(fabric)
    optimizer.zero_grad()
    fabric.backward(loss_of(model(x), y))
    optimizer.step()
    return state, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_state_that_is_the_optimizers_own(devices: int) -> None:
    """At stage 0 in 32-bit; a loop of torch alone goes on from it."""
    for state, after in run_ranks(devices, hands_over, strategy="deepspeed:stage=0"):
        plain = build("plain", 4)
        optimizer = optimizer_for(plain, "adamw")
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        data = Samples(16)
        loss_of(plain(data.x), data.y).backward()
        optimizer.step()
        torch.testing.assert_close([p.detach() for p in plain.parameters()], after)
