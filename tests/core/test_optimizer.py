"""An optimizer that was set up behaves as the one it was made from."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau, StepLR

from torchweft import Fabric, is_wrapped
from torchweft.api import Precision, Strategy
from torchweft.errors import InvalidRequest, Misuse


class Own(Optimizer):
    """An optimizer with attributes and methods of its own."""

    count = 0
    rate = 0.5

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.5})
        self.rate = 0.25
        self._step = "a name of its own"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * self.rate)

    def twice(self) -> None:
        self.step()
        self.step()


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def backward(fabric: Fabric, model: Any) -> Tensor:
    loss: Tensor = model(torch.ones(2, 2)).square().mean()
    fabric.backward(loss)
    return loss


def set_up(fabric: Fabric, make: Callable[..., Optimizer] = SGD, **options: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    original = make(net.parameters(), **(options or {"lr": 0.1}))
    model, optimizer = fabric.setup(net, original)
    return model, optimizer, original


# -- being the original --------------------------------------------------------------------------


def test_it_is_an_instance_of_the_originals_class(fabric: Fabric) -> None:
    _, optimizer, original = set_up(fabric, Adam)
    assert is_wrapped(optimizer)
    assert not is_wrapped(original)
    assert isinstance(optimizer, Adam)
    assert optimizer.optimizer is original
    assert repr(optimizer).startswith("FabricAdam (")


def test_state_and_groups_are_those_of_the_original_at_any_time(fabric: Fabric) -> None:
    model, optimizer, original = set_up(fabric, Adam)
    assert optimizer.param_groups is original.param_groups
    assert optimizer.state is original.state
    assert optimizer.defaults is original.defaults
    backward(fabric, model)
    optimizer.step()
    assert "exp_avg" in optimizer.state[model.weight]
    optimizer.param_groups[0]["lr"] = 0.7
    assert original.param_groups[0]["lr"] == 0.7
    original.load_state_dict(original.state_dict())
    assert optimizer.param_groups is original.param_groups
    assert optimizer.state is original.state
    state = optimizer.state_dict()
    assert state["param_groups"][0]["lr"] == 0.7
    state["param_groups"][0]["lr"] = 0.9
    optimizer.load_state_dict(state)
    assert original.param_groups[0]["lr"] == 0.9


def test_groups_may_be_added(fabric: Fabric) -> None:
    model, optimizer, original = set_up(fabric)
    extra = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert len(original.param_groups) == 2
    extra.grad = torch.ones(1)
    backward(fabric, model)
    optimizer.step()
    assert extra.item() == 0.5


def test_attributes_are_those_of_the_original(fabric: Fabric) -> None:
    model, optimizer, original = _own(fabric)
    assert optimizer.rate == 0.25
    assert optimizer._step == "a name of its own"
    backward(fabric, model)
    optimizer.step()
    assert optimizer.count == original.count == 1
    optimizer.twice()
    assert optimizer.count == original.count == 3
    optimizer.rate = 1.0
    assert original.rate == 1.0
    optimizer.new = 1
    assert original.new == 1
    del optimizer.new
    assert not hasattr(original, "new")
    with pytest.raises(AttributeError, match="missing"):
        _ = optimizer.missing


def _own(fabric: Fabric) -> tuple[Any, Any, Own]:
    net = nn.Linear(2, 2)
    original = Own(net.parameters())
    model, optimizer = fabric.setup(net, original)
    return model, optimizer, original


def test_hooks_run_once(fabric: Fabric) -> None:
    model, optimizer, _ = set_up(fabric)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    backward(fabric, model)
    optimizer.step()
    optimizer.state_dict()
    assert calls == ["before", "after", "state"]


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.1, momentum=0.9),
        lambda p: Adam(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
)
def test_it_trains_as_the_original_does(fabric: Fabric, make: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(2, 2)
    model = copy.deepcopy(plain)
    plain_optimizer = make(plain.parameters())
    model, optimizer = fabric.setup(model, make(model.parameters()))
    for _ in range(4):
        plain(torch.ones(2, 2)).square().mean().backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        backward(fabric, model)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.weight, plain.weight)


def test_gradients_are_forgotten_as_asked(fabric: Fabric) -> None:
    model, optimizer, _ = set_up(fabric)
    backward(fabric, model)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(model.weight.grad, torch.zeros(2, 2))
    optimizer.zero_grad()
    assert model.weight.grad is None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_closures(precision: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model, optimizer, _ = set_up(fabric, torch.optim.LBFGS, lr=0.5)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(1)
        return backward(fabric, model)

    first = optimizer.step(closure)
    assert len(calls) > 1
    assert optimizer.step(closure) < first


def test_several_optimizers_for_one_model(fabric: Fabric) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = copy.deepcopy(net.state_dict())
    one, two = SGD(net[0].parameters(), lr=0.1), Adam(net[1].parameters())
    model, first, second = fabric.setup(net, one, two)
    assert first.optimizer is one
    assert second.optimizer is two
    backward(fabric, model)
    second.step()
    assert torch.equal(net[0].weight, before["0.weight"])
    assert not torch.equal(net[1].weight, before["1.weight"])
    first.step()
    assert not torch.equal(net[0].weight, before["0.weight"])


def test_state_that_was_there_before_follows_the_parameters() -> None:
    net = nn.Linear(2, 2)
    optimizer = Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    model, wrapped = fabric.setup(net, optimizer)
    assert optimizer.state[net.weight]["exp_avg"].dtype == torch.float64
    assert optimizer.state[net.weight]["step"].dtype == torch.float32
    wrapped.zero_grad()
    backward(fabric, model)
    wrapped.step()


class Counting(Strategy):
    """Counts what passes through it."""

    name = "counting"
    processes = "one"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def step(self, optimizer: Optimizer, closure: Any) -> Any:
        self.calls.append("step")
        return super().step(optimizer, closure)

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        self.calls.append("zero_grad")
        super().zero_grad(optimizer, set_to_none)

    def backward(self, loss: Tensor, module: Any, *args: Any, **kwargs: Any) -> None:
        self.calls.append("backward")
        super().backward(loss, module, *args, **kwargs)


class CountingPrecision(Precision):
    """Counts what passes through it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def scale(self, loss: Tensor) -> Tensor:
        self.calls.append("scale")
        return loss

    def step(self, optimizer: Optimizer, closure: Any) -> Any:
        self.calls.append("step")
        return super().step(optimizer, closure)

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        self.calls.append("zero_grad")
        super().zero_grad(optimizer, set_to_none)


@pytest.mark.parametrize("strategy", [True, False])
@pytest.mark.parametrize("precision", [True, False])
def test_what_strategy_and_precision_override_is_called(strategy: bool, precision: bool) -> None:
    asked, formats = Counting(), CountingPrecision()
    fabric = Fabric(
        accelerator="cpu",
        strategy=asked if strategy else "single_device",
        precision=formats if precision else None,
    )
    model, optimizer, _ = set_up(fabric)
    before = model.weight.detach().clone()
    backward(fabric, model)
    optimizer.step()
    assert not torch.equal(model.weight, before)
    optimizer.zero_grad()
    assert model.weight.grad is None
    assert asked.calls == (["backward", "step", "zero_grad"] if strategy else [])
    assert formats.calls == (["scale", "step", "zero_grad"] if precision else [])


# -- schedulers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["before", "after", "given"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_schedulers_work_with_either_and_without_a_warning(made: str, precision: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    net = nn.Linear(2, 2)
    original = SGD(net.parameters(), lr=1.0)
    if made == "given":
        model, optimizer, scheduler = fabric.setup(
            net, original, scheduler=StepLR(original, 1, 0.5)
        )
    elif made == "before":
        scheduler = StepLR(original, 1, 0.5)
        model, optimizer = fabric.setup(net, original)
    else:
        model, optimizer = fabric.setup(net, original)
        scheduler = StepLR(optimizer, 1, 0.5)
    before = model.bias.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.5 ** (step + 1)
    assert scheduler.get_last_lr() == [0.125]
    assert torch.allclose(model.bias, before - 1.75, atol=1e-2)


def test_several_schedulers_in_both_places(fabric: Fabric) -> None:
    strategy = Counting()
    fabric = Fabric(accelerator="cpu", strategy=strategy)
    net = nn.Linear(2, 2)
    original = SGD(net.parameters(), lr=1.0)
    first = LinearLR(original, start_factor=0.5, total_iters=2)
    model, optimizer = fabric.setup(net, original)
    second = StepLR(optimizer, 1, 0.1)
    third = ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(2):
        backward(fabric, model)
        optimizer.step()
        first.step()
        second.step()
        third.step(1.0)
    assert strategy.calls.count("step") == 2


# -- copies --------------------------------------------------------------------------------------


def test_a_pickled_optimizer_is_the_original(fabric: Fabric) -> None:
    model, optimizer, _ = set_up(fabric, Adam)
    backward(fabric, model)
    optimizer.step()
    read = pickle.loads(pickle.dumps(optimizer))
    assert type(read) is Adam
    assert len(read.state) == 2


def test_a_deep_copy_steps_its_own_parameters(fabric: Fabric) -> None:
    model, optimizer, _ = set_up(fabric, Adam)
    copied_model, copied = copy.deepcopy((model, optimizer))
    assert is_wrapped(copied)
    assert isinstance(copied, Adam)
    before = model.weight.detach().clone()
    backward(fabric, copied_model)
    copied.step()
    assert torch.equal(model.weight, before)
    assert not torch.equal(copied_model.weight, before)
    assert copied.modules == [copied_model.prepared]


# -- what is refused -----------------------------------------------------------------------------


def test_an_optimizer_of_another_model_is_refused(fabric: Fabric) -> None:
    foreign = SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(
        InvalidRequest,
        match=r"SGD holds no parameter of Linear; make the optimizer from the parameters of the "
        r"model, and set up the model with it or before it",
    ):
        fabric.setup(nn.Linear(2, 2), foreign)


def test_an_optimizer_without_a_model_is_refused(fabric: Fabric) -> None:
    net = nn.Linear(2, 2)
    optimizer = SGD(net.parameters(), lr=0.1)
    with pytest.raises(InvalidRequest, match="SGD holds no parameter of a model that was set up"):
        fabric.setup_optimizers(optimizer)
    model = fabric.setup_module(net)
    wrapped = fabric.setup_optimizers(optimizer)
    assert wrapped.optimizer is optimizer
    assert wrapped.modules == [model.prepared]


def test_one_optimizer_of_several_models(fabric: Fabric) -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    first, second = fabric.setup(one), fabric.setup_module(two)
    optimizer = fabric.setup_optimizers(SGD([*one.parameters(), *two.parameters()], lr=0.1))
    assert optimizer.modules == [first.prepared, second.prepared]


def test_alone_an_optimizer_may_have_parameters_of_no_model(fabric: Fabric) -> None:
    net, temperature = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    _, optimizer = fabric.setup(net, SGD([*net.parameters(), temperature], lr=0.1))
    assert len(optimizer.param_groups[0]["params"]) == 3


@pytest.mark.parametrize("again", [0, 1])
def test_an_optimizer_is_set_up_once(fabric: Fabric, again: int) -> None:
    _, optimizer, original = set_up(fabric)
    with pytest.raises(
        Misuse, match=r"this .*SGD was already set up; use what fabric.setup\(\) returned"
    ):
        fabric.setup(nn.Linear(2, 2), (optimizer, original)[again])
    with pytest.raises(Misuse, match="was already set up"):
        fabric.setup_optimizers((optimizer, original)[again])
