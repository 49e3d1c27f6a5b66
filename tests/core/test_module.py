"""A model that was set up behaves as the one it was made from."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchweft import Fabric, is_wrapped
from torchweft.api import DataShard, Prepared, Strategy
from torchweft.errors import InvalidRequest, Misuse
from torchweft.wrappers import FabricModule


class Net(nn.Module):
    """A model with a bit of everything."""

    hidden = 3

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 4
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.note = "original"

    def forward(self, data: Tensor) -> Tensor:
        return self.head(self.body(data))

    def loss(self, data: Tensor) -> Tensor:
        return self.forward(data).sum()

    def penalty(self) -> Tensor:
        return sum((p**2).sum() for p in self.parameters())

    def describe(self) -> str:
        return self.note

    @torch.no_grad()
    def predict(self, data: Tensor) -> Tensor:
        return self(data)


class Around(nn.Module):
    """What a wrapping strategy puts around a module."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inside(*args, **kwargs)


class Wrapping(Strategy):
    """Puts a module around the user's, as DistributedDataParallel is."""

    name = "wrapping"
    processes = "one"

    @property
    def shard(self) -> DataShard:
        return DataShard()

    def setup(self, module: nn.Module, optimizers: Any, scheduler: Any) -> Prepared:
        return Prepared(module=Around(module), optimizers=list(optimizers), scheduler=scheduler)

    def original(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, Around)
        return module.inside

    def forward_method(self, module: nn.Module, name: str) -> Any:
        assert isinstance(module, Around)
        module.calls += 1
        return super().forward_method(module, name)


class Owning(Strategy):
    """An engine that must be told of every backward."""

    name = "owning"
    processes = "one"
    owns_backward = True


@pytest.fixture
def data() -> Tensor:
    return torch.ones(3, 2)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def model(net: Net) -> Any:
    return Fabric(accelerator="cpu", devices=1).setup(net)


@pytest.fixture
def wrapped(net: Net) -> Any:
    return Fabric(accelerator="cpu", strategy=Wrapping()).setup(net)


# -- attributes ----------------------------------------------------------------------------------


def test_it_can_be_told_from_its_original(model: Any, net: Net) -> None:
    assert is_wrapped(model)
    assert not is_wrapped(net)
    assert isinstance(model, nn.Module)
    assert model.module is net


def test_attributes_are_those_of_the_original(model: Any, net: Net) -> None:
    assert model.note == "original"
    assert model.hidden == 4
    assert model.body is net.body
    assert model.describe() == "original"
    assert "note" in dir(model)
    assert "body" in dir(model)
    model.note = "changed"
    assert net.note == "changed"
    model.extra = nn.Linear(1, 1)
    assert net.extra is model.extra
    del model.extra
    assert not hasattr(net, "extra")
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'missing'"):
        _ = model.missing


def test_it_knows_its_device_unless_the_original_has_one_of_its_own(model: Any, net: Net) -> None:
    assert model.device == torch.device("cpu")
    net.device = "mine"  # type: ignore[assignment]
    assert model.device == "mine"


def test_the_representation_shows_the_original(model: Any, net: Net) -> None:
    assert repr(model) == f"FabricModule({net!r})"


def test_parameters_are_the_very_same_under_the_same_names(model: Any, net: Net) -> None:
    assert [id(p) for p in model.parameters()] == [id(p) for p in net.parameters()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in net.named_buffers()]
    assert next(iter(model.modules())) is net
    assert dict(model.named_children())["body"] is net.body
    assert model.get_submodule("body.0") is net.body[0]
    assert model.get_parameter("head.weight") is net.head.weight
    assert model.get_buffer("seen") is net.seen


@pytest.mark.parametrize("kind", ["model", "wrapped"])
def test_state_has_the_names_of_the_original(
    kind: str, net: Net, data: Tensor, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(kind)
    assert list(made.state_dict()) == list(net.state_dict())
    other = Net()
    made.load_state_dict(other.state_dict())
    assert torch.equal(net.head.weight, other.head.weight)
    assert "head.bias" in made.load_state_dict({}, strict=False).missing_keys


def test_it_can_be_a_part_of_another_module(model: Any, net: Net) -> None:
    outer = nn.Sequential(model, nn.Linear(1, 1))
    names = [f"0.{name}" for name in net.state_dict()]
    assert [name for name in outer.state_dict() if name.startswith("0.")] == names
    assert len(list(outer.parameters())) == len(list(net.parameters())) + 2
    other = nn.Sequential(Net(), nn.Linear(1, 1))
    outer.load_state_dict(other.state_dict())
    assert torch.equal(net.head.weight, other[0].head.weight)
    outer.eval()
    assert not net.body.training


@pytest.mark.parametrize("kind", ["model", "wrapped"])
def test_the_mode_is_seen_on_both(kind: str, net: Net, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(kind)
    assert made.eval() is made
    assert not made.training
    assert not net.training
    assert not net.body[1].training
    assert not made.prepared.training
    made.train()
    assert made.training
    assert net.training
    assert made.prepared.training
    net.eval()
    assert not made.training


def test_what_changes_a_module_changes_the_original(model: Any, net: Net) -> None:
    assert model.double() is model
    assert net.head.weight.dtype == torch.float64
    assert model.to(torch.float32) is model
    assert model.requires_grad_(False) is model
    assert not net.head.weight.requires_grad
    kinds: list[type] = []
    assert model.apply(lambda module: kinds.append(type(module))) is model
    assert kinds[-1] is Net
    model.register_buffer("later", torch.ones(1))
    assert "later" in net.state_dict()
    model.add_module("more", nn.Linear(1, 1))
    assert net.more is model.more


def test_hooks_run(model: Any, net: Net, data: Tensor) -> None:
    calls: list[str] = []
    handles = [
        model.register_forward_pre_hook(lambda module, args: calls.append("before")),
        model.register_forward_hook(lambda module, args, output: calls.append("after")),
        model.register_full_backward_hook(lambda module, a, b: calls.append("backward")),
    ]
    model(data.requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(data)
    assert len(calls) == 3


def test_no_method_of_a_module_is_left_to_the_wrapper_itself() -> None:
    """torch may add methods; each must reach the original."""
    own = {"forward", "train", "eval", "compile", "state_dict", "load_state_dict"}
    handed_on = vars(FabricModule)["register_buffer"].__code__
    for name, member in vars(nn.Module).items():
        if not inspect.isfunction(member) or name.startswith("__"):
            continue
        reached = vars(FabricModule)[name]
        assert reached.__code__ is not member.__code__, name
        assert name in own or reached.__code__ is handed_on, name


def test_containers_are_containers() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = fabric.setup(layers)
    assert is_wrapped(model)
    assert len(model) == 2
    assert model[0] is layers[0]
    assert list(model) == list(layers)
    model[1] = nn.Tanh()
    assert type(layers[1]) is nn.Tanh
    assert type(pickle.loads(pickle.dumps(model))) is nn.Sequential
    named = fabric.setup(nn.ModuleDict({"a": nn.Linear(1, 1)}))
    assert "a" in named
    assert list(named.keys()) == ["a"]


def test_what_is_no_container_is_none(model: Any) -> None:
    assert model
    with pytest.raises(TypeError, match="has no len"):
        len(model)


def test_it_works_with_torchs_functional_calls(model: Any, net: Net, data: Tensor) -> None:
    replaced = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    output = torch.func.functional_call(model, replaced, (data,))
    assert torch.equal(output, torch.zeros(3, 1))
    assert not torch.equal(net.head.weight, torch.zeros(1, 4))


# -- copies --------------------------------------------------------------------------------------


def test_a_pickled_model_is_the_original(model: Any, net: Net) -> None:
    read = pickle.loads(pickle.dumps(model))
    assert type(read) is Net
    assert torch.equal(read.head.weight, net.head.weight)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is Net


def test_a_deep_copy_is_set_up_alike_and_apart(data: Tensor) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    net = Net()
    model = fabric.setup(net)
    copied = copy.deepcopy(model)
    assert is_wrapped(copied)
    assert copied.module is not net
    model.eval()
    assert copied.training
    copied.eval()
    # Under the same precision: a 32-bit input would not do for the module alone.
    assert torch.equal(copied(data), model(data))
    fabric.backward(copied(data).sum())
    assert copied.head.weight.grad is not None
    assert net.head.weight.grad is None


def test_an_average_of_weights_can_be_kept(model: Any, data: Tensor) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    averaged.eval()
    model.eval()
    assert torch.equal(averaged(data), model(data))


def test_gradients_do_not_flow_through_a_copy_without_the_strategy(
    wrapped: Any, data: Tensor
) -> None:
    copied = copy.deepcopy(wrapped)
    with torch.no_grad():
        copied(data)
    with pytest.raises(
        Misuse,
        match=r"this model is a copy of one that strategy 'wrapping' prepared, .* set it up: "
        r"fabric.setup\(model.module, optimizer\); .* requires_grad_\(False\)",
    ):
        copied(data).sum().backward()
    assert is_wrapped(Fabric(accelerator="cpu", devices=1).setup(copied.module))
    copied.requires_grad_(False)
    (copied(data).sum() + wrapped(data).sum()).backward()
    assert wrapped.head.weight.grad is not None


# -- calling -------------------------------------------------------------------------------------


def test_forward_is_the_same_as_calling() -> None:
    model = Fabric(accelerator="cpu", devices=1, precision="bf16-true").setup(nn.Linear(2, 2))
    data = torch.ones(1, 2)
    assert torch.equal(model.forward(data), model(data))


def test_calls_go_through_what_the_strategy_made(wrapped: Any, data: Tensor) -> None:
    wrapped(data)
    wrapped.forward(data)
    assert wrapped.prepared.calls == 2


def test_methods_that_run_parts_past_the_strategy_are_an_error(wrapped: Any, data: Tensor) -> None:
    with pytest.raises(
        Misuse,
        match=r"Net.loss\(\) runs Sequential past the strategy, .* call "
        r"model.mark_forward_method\('loss'\) after fabric.setup\(\), or run it under "
        r"torch.no_grad\(\)",
    ):
        wrapped.loss(data)
    # No hook is left behind.
    wrapped(data)
    assert not wrapped.head._forward_pre_hooks


def test_methods_that_train_nothing_are_called_as_they_are(wrapped: Any, data: Tensor) -> None:
    assert wrapped.describe() == "original"
    assert wrapped.describe.__name__ == "describe"
    assert wrapped.penalty().requires_grad
    with torch.no_grad():
        wrapped.loss(data)
    wrapped.eval()
    wrapped.predict(data)
    wrapped.requires_grad_(False)
    wrapped.loss(data)
    assert wrapped.prepared.calls == 0


def test_a_marked_method_goes_through_precision_and_strategy(data: Tensor) -> None:
    fabric = Fabric(accelerator="cpu", strategy=Wrapping(), precision="64-true")
    model = fabric.setup(Net())
    model.mark_forward_method("loss")
    assert model.prepared.calls == 1
    assert model.loss(data).dtype == torch.float64
    model.mark_forward_method(model.module.predict)
    assert model.predict(data).dtype == torch.float64
    model.mark_forward_method("forward")
    assert model.forward(data).dtype == torch.float64


def test_only_methods_can_be_marked(model: Any) -> None:
    for name in ("missing", "note"):
        with pytest.raises(
            InvalidRequest, match=rf"mark_forward_method\('{name}'\): Net has no method"
        ):
            model.mark_forward_method(name)


# -- backward ------------------------------------------------------------------------------------


def owning() -> tuple[Fabric, Any]:
    fabric = Fabric(accelerator="cpu", strategy=Owning())
    return fabric, fabric.setup(Net())


def test_the_wrong_backward_is_an_error_that_names_the_line(data: Tensor) -> None:
    fabric, model = owning()
    loss = model(data).sum()
    with pytest.raises(
        Misuse,
        match=r"^loss.backward\(\) was called, but strategy 'owning' needs "
        r"fabric.backward\(loss\) in its place; change that line$",
    ):
        loss.backward()
    fabric.backward(model(data).sum())
    with pytest.raises(Misuse, match=r"loss.backward\(\) was called"):
        model(data).sum().backward()


def test_gradients_that_are_not_accumulated_may_be_taken(data: Tensor) -> None:
    fabric, model = owning()
    given = data.clone().requires_grad_()
    loss = model(given).sum()
    (gradient,) = torch.autograd.grad(loss, given, create_graph=True)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    fabric.backward(loss + gradient.norm())
    assert given.grad is not None
    hooked = [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    model(data)
    assert hooked
    assert not [p for p in model.parameters() if p._post_accumulate_grad_hooks]


def test_outputs_that_are_no_tensors_are_watched_inside() -> None:
    fabric = Fabric(accelerator="cpu", strategy=Owning())

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self) -> Any:
            return {"a": [self.weight * 2], "parameter": self.weight}

    model = fabric.setup(Nested())
    output = model()
    assert output["parameter"] is model.weight
    assert not model.weight._backward_hooks
    with pytest.raises(Misuse, match=r"needs fabric\.backward\(loss\)"):
        output["a"][0].backward()


def test_where_any_backward_is_right_nothing_is_put_around_it(model: Any, data: Tensor) -> None:
    output = model(data)
    assert output._backward_hooks is None
    output.sum().backward()
    assert model.head.weight.grad is not None


# -- torch.compile -------------------------------------------------------------------------------


def test_a_compiled_model_keeps_its_names_and_is_compiled_around_the_strategy(
    data: Tensor,
) -> None:
    net = Net().eval()
    expected = net(data)
    compiled = torch.compile(net, backend="eager")
    fabric = Fabric(accelerator="cpu", strategy=Wrapping())
    model, _ = fabric.setup(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1))
    assert list(model.state_dict()) == list(net.state_dict())
    assert model.module is net
    assert type(model.prepared) is Around
    assert torch.equal(model(data), expected)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for again in (net, compiled):
        with pytest.raises(Misuse, match="was already set up"):
            fabric.setup(again)


def test_a_compiled_model_may_be_left_inside() -> None:
    net = nn.Linear(2, 2)
    compiled = torch.compile(net, backend="eager")
    model = Fabric(accelerator="cpu", strategy=Wrapping()).setup(compiled, _reapply_compile=False)
    assert model.module is compiled
    assert model.prepared.inside is compiled


def test_a_compiled_model_on_one_device_is_the_one_that_was_given(data: Tensor) -> None:
    net = Net().eval()
    compiled = torch.compile(net, backend="eager")
    model = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup(compiled)
    assert model(data).dtype == torch.float32
    model.train()
    model(data).sum().backward()
    assert net.head.weight.grad is not None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_can_be_compiled_after_it_was_set_up(precision: str, data: Tensor) -> None:
    net = Net().eval()
    model = Fabric(accelerator="cpu", devices=1, precision=precision).setup(net)
    expected = model(data)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(data), expected, atol=1e-2)
    compiled(data).sum().backward()
    assert net.head.weight.grad is not None
    model.compile(backend="eager")
    assert torch.allclose(model(data), expected, atol=1e-2)
