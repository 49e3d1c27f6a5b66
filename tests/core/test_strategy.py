"""What a strategy does when it overrides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchweft import Fabric
from torchweft.api import Alone, DataShard, Precision, Strategy
from torchweft.api.initialising import SkipInit, default_dtype


@pytest.fixture
def strategy() -> Strategy:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return fabric.strategy


def test_it_is_alone_with_one_replica(strategy: Strategy) -> None:
    assert isinstance(strategy.collectives, Alone)
    assert strategy.shard == DataShard(replicas=1, first=0, count=1)
    assert strategy.place.rank.world_size == 1


def test_setup_gives_back_what_it_was_given(strategy: Strategy) -> None:
    module = nn.Linear(1, 1)
    optimizer, scheduler = torch.optim.SGD(module.parameters(), lr=0.1), object()
    prepared = strategy.setup(module, (optimizer,), scheduler)
    assert prepared.module is module
    assert prepared.optimizers == [optimizer]
    assert prepared.scheduler is scheduler
    assert strategy.original(prepared.module) is module
    assert strategy.setup_optimizer(optimizer) is optimizer
    assert strategy.forward_method(module, "extra_repr")() == module.extra_repr()


def test_state_is_by_the_modules_names(strategy: Strategy) -> None:
    module = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 1)).sum().backward()
    strategy.step(optimizer, None)
    assert [name for name, _ in strategy.module_state(module)] == ["weight", "bias"]
    state = strategy.optimizer_state(optimizer, [module])
    assert list(state["state"]) == ["weight", "bias"]
    other = nn.Linear(1, 1)
    its_optimizer = torch.optim.Adam(other.parameters())
    strategy.load_module_state(other, dict(strategy.module_state(module)))
    strategy.load_optimizer_state(its_optimizer, [other], state)
    assert torch.equal(other.weight, module.weight)
    assert its_optimizer.state[other.weight]["step"] == 1
    assert strategy.extra_state() == {}
    strategy.load_extra_state({"other": 1})


def test_a_strategy_may_be_written_in_a_few_lines() -> None:
    class Louder(Strategy):
        """Steps twice as far."""

        name = "louder"
        processes = "one"

        def step(self, optimizer: Any, closure: Any) -> Any:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad *= 2
            return super().step(optimizer, closure)

    fabric = Fabric(accelerator="cpu", strategy=Louder())
    module = nn.Linear(1, 1)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=1.0))
    before = model.bias.item()
    fabric.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    assert model.bias.item() == pytest.approx(before - 2)


# -- new modules ---------------------------------------------------------------------------------

LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(3, 3),
    lambda: nn.Conv2d(1, 2, 3),
    lambda: nn.Embedding(3, 2),
    lambda: nn.LSTM(2, 2),
    lambda: nn.MultiheadAttention(4, 2),
]


@pytest.mark.parametrize("make", LAYERS)
def test_without_filling_no_number_is_drawn_for_a_parameter(make: Any) -> None:
    before = torch.get_rng_state()
    with SkipInit():
        module = make()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad and not p.is_meta for p in module.parameters())
    make()
    assert not torch.equal(torch.get_rng_state(), before)


def test_buffers_are_filled_all_the_same() -> None:
    class WithBuffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("table", torch.empty(4).fill_(7))
            nn.init.constant_(self.table, 8)
            self.register_buffer("noise", torch.zeros(100).normal_())

    with SkipInit():
        module: Any = WithBuffers()
    assert module.norm.running_var.tolist() == [1, 1, 1]
    assert module.table.tolist() == [8, 8, 8, 8]
    assert module.noise.abs().sum() > 0


def test_the_default_dtype_is_put_back_whatever_happens() -> None:
    with pytest.raises(KeyError), default_dtype(torch.float64):
        assert torch.ones(1).dtype == torch.float64
        raise KeyError
    assert torch.ones(1).dtype == torch.float32


# -- a precision that does nothing ---------------------------------------------------------------


def test_a_precision_changes_nothing_by_default() -> None:
    precision = Precision()
    precision.start(torch.device("cpu"))
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    data = {"a": torch.ones(1)}
    assert precision.convert_module(module) is module
    assert precision.convert_input(data) is data
    assert precision.convert_output(data) is data
    loss = module(torch.ones(1, 1)).sum()
    assert precision.scale(loss) is loss
    loss.backward()
    precision.unscale(optimizer)
    assert module.bias.grad is not None
    assert module.bias.grad.item() == 1
    assert precision.step(optimizer, lambda: 3.5) == 3.5
    precision.zero_grad(optimizer)
    assert module.bias.grad is None
    assert precision.state_dict() == {}
    precision.load_state_dict({})
    with precision.forward_context():
        assert not torch.is_autocast_enabled("cpu")
