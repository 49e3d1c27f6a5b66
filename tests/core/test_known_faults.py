"""What other libraries of this kind were found to do wrong, and this one is to do right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from torchweft import Fabric


def set_up(fabric: Fabric) -> Any:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fabric.setup(model, optimizer, scheduler=StepLR(optimizer, 1, gamma=0.5))


def test_models_optimizers_and_schedulers_deep_in_the_state(tmp_path: Path) -> None:
    """They are saved as states rather than pickled whole, and come back as what they are."""
    fabric = Fabric(accelerator="cpu")
    model, optimizer, scheduler = set_up(fabric)
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    scheduler.step()
    state = {"nets": {"generator": model, "all": [model]}, "rest": [optimizer, {"s": scheduler}]}
    fabric.save(tmp_path / "file.ckpt", state)
    raw = torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert torch.equal(raw["nets"]["generator"]["weight"], model.weight)

    model2, optimizer2, scheduler2 = set_up(fabric)
    state2 = {
        "nets": {"generator": model2, "all": [model2]},
        "rest": [optimizer2, {"s": scheduler2}],
    }
    assert fabric.load(tmp_path / "file.ckpt", state2) == {}
    assert state2["rest"][1]["s"] is scheduler2
    assert torch.equal(model2.weight, model.weight)
    assert (scheduler2.last_epoch, optimizer2.param_groups[0]["lr"]) == (1, 0.05)


def test_a_gathered_tensor_can_be_had_with_one_shape_everywhere() -> None:
    fabric = Fabric(accelerator="cpu")
    assert fabric.all_gather(torch.ones(3)).shape == (3,)
    assert fabric.all_gather({"a": [torch.ones(3)]}, stack=True)["a"][0].shape == (1, 3)


def test_the_users_list_of_callbacks_stays_the_users() -> None:
    given: list[Any] = [object()]
    fabric = Fabric(accelerator="cpu", callbacks=given)
    fabric.callbacks.append(3)
    given.append(4)
    assert (len(given), len(fabric.callbacks)) == (2, 1)


def test_hooks_are_gone_after_an_error_in_forward() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner(x)
            raise ValueError("no")

    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    net = Net()
    model = fabric.setup(net)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            model(torch.ones(1, 2))
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not torch.is_autocast_enabled("cpu")
