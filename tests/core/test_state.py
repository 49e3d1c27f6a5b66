"""torchweft.api.state: state dictionaries by the names of the module as it was written."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW, Optimizer

from torchweft.api.state import (
    load_named_module_state,
    load_named_optimizer_state,
    module_versions,
    named_module_state,
    named_optimizer_state,
    parameter_names,
)
from torchweft.errors import CheckpointError


class Tied(nn.Module):
    """An embedding shared with the output, a frozen layer and a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.frozen(self.embed(x))))


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw_in_two_groups(model: nn.Module) -> Optimizer:
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    return AdamW([{"params": decay}, {"params": plain, "weight_decay": 0.0, "lr": 0.03}], lr=0.01)


def adamw_by_name(model: nn.Module) -> Optimizer:
    return AdamW(model.named_parameters(), lr=0.01)


def train(model: nn.Module, optimizer: Optimizer, steps: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randint(0, 7, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), (x + 1) % 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(make: Any, seed: int = 0) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = make(model)
    train(model, optimizer, 3)
    return model, optimizer


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# -- modules -------------------------------------------------------------------------------------


def test_a_modules_state_is_by_its_own_names_and_shares_its_memory() -> None:
    model = Tied()
    state = dict(named_module_state(model))
    assert list(state) == list(model.state_dict())
    assert state["embed.weight"].data_ptr() == model.embed.weight.data_ptr()


def test_loading_fills_the_module_in_place() -> None:
    source, _ = trained(sgd)
    target = Tied()
    weight = target.embed.weight
    load_named_module_state(target, dict(named_module_state(source)), strict=True)
    assert target.embed.weight is weight
    assert target.out.weight is weight
    assert_same(dict(target.state_dict()), dict(source.state_dict()))


def test_missing_and_unexpected_names_are_named() -> None:
    state = dict(named_module_state(Tied()))
    state["head.weight"] = state.pop("out.bias")
    with pytest.raises(CheckpointError) as caught:
        load_named_module_state(Tied(), state, strict=True)
    assert str(caught.value) == (
        "the checkpoint has no 'out.bias'; the model has no 'head.weight'; the checkpoint holds "
        "'embed.weight', 'frozen.weight', 'frozen.bias', 'norm.weight', 'norm.bias', "
        "'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked' and 2 more"
    )
    load_named_module_state(Tied(), state, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_an_error_that_shows_both(strict: bool) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_named_module_state(nn.Linear(3, 2), nn.Linear(4, 2).state_dict(), strict)
    assert str(caught.value) == (
        "the checkpoint is of another model: 'weight' is (2, 4) in the checkpoint and (2, 3) in "
        "the model"
    )


def test_a_state_that_is_no_models_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="not the state of a model: it holds 0, 1"):
        load_named_module_state(nn.Linear(3, 2), {0: 1, 1: 2}, True)  # type: ignore[dict-item]


class Turned(nn.Linear):
    """Kept its weight transposed in version 1."""

    _version = 2

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, *rest: Any, **named: Any
    ) -> None:
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"].T
        super()._load_from_state_dict(state, prefix, metadata, *rest, **named)


def test_modules_see_the_version_they_were_saved_with() -> None:
    source = nn.Sequential(Turned(3, 3))
    state = OrderedDict(named_module_state(source))
    state._metadata = module_versions(source)  # type: ignore[attr-defined]
    target = nn.Sequential(Turned(3, 3))
    load_named_module_state(target, state, strict=True)
    torch.testing.assert_close(target[0].weight, source[0].weight)

    state._metadata["0"]["version"] = 1  # type: ignore[attr-defined]
    load_named_module_state(target, state, strict=True)
    torch.testing.assert_close(target[0].weight, source[0].weight.T)


def test_a_module_may_convert_an_old_layout() -> None:
    # The state of the former weight_norm, which the parametrization takes too.
    source = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    state = dict(named_module_state(source))
    state["weight_g"] = state.pop("parametrizations.weight.original0")
    state["weight_v"] = state.pop("parametrizations.weight.original1")
    target = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    load_named_module_state(target, state, strict=True)
    torch.testing.assert_close(target.weight, source.weight)


def test_a_lazy_module_takes_its_shape_from_the_checkpoint() -> None:
    source = nn.Linear(3, 2)
    target = nn.LazyLinear(2)
    load_named_module_state(target, dict(named_module_state(source)), strict=True)
    torch.testing.assert_close(target.weight, source.weight)


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen = 0

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_extra_state_is_carried() -> None:
    source, target = Counting(), Counting()
    source.seen = 5
    load_named_module_state(target, dict(named_module_state(source)), strict=True)
    assert target.seen == 5


@pytest.mark.parametrize("part", [False, True])
def test_names_are_those_before_torch_compile(part: bool) -> None:
    plain, inner = Tied(), Tied()
    model: Any = inner
    if part:
        inner.out = torch.compile(inner.out, backend="eager")  # type: ignore[assignment]
    else:
        model = torch.compile(inner, backend="eager")
    state = OrderedDict(named_module_state(model))
    state._metadata = module_versions(model)  # type: ignore[attr-defined]
    assert list(state) == list(plain.state_dict())
    assert list(state._metadata) == list(plain.state_dict()._metadata)  # type: ignore[attr-defined]
    assert set(parameter_names([model]).values()) == set(parameter_names([plain]).values())

    load_named_module_state(plain, state, strict=True)
    torch.testing.assert_close(plain.out.bias, inner.out.bias)
    # As torch itself writes it.
    plain = Tied()
    load_named_module_state(plain, model.state_dict(), strict=True)
    torch.testing.assert_close(plain.out.bias, inner.out.bias)
    # And back.
    other = Tied()
    load_named_module_state(model, other.state_dict(), strict=True)
    torch.testing.assert_close(inner.out.bias, other.out.bias)


def test_versions_reach_a_compiled_module() -> None:
    source = Turned(3, 3)
    state = OrderedDict(named_module_state(source))
    state._metadata = module_versions(source)  # type: ignore[attr-defined]
    target: Any = torch.compile(Turned(3, 3), backend="eager")
    load_named_module_state(target, state, strict=True)
    torch.testing.assert_close(target.weight, source.weight)


# -- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adamw_in_two_groups, adamw_by_name])
def test_the_layout_is_that_of_torch_distributed_checkpoint(make: Any) -> None:
    model, optimizer = trained(make)
    ours = named_optimizer_state(optimizer, [model])
    theirs = get_optimizer_state_dict(model, optimizer)
    assert_same(ours, theirs)
    assert "embed.weight" in ours["state"]
    assert "out.weight" not in ours["state"]
    assert "frozen.weight" not in ours["state"]


@pytest.mark.parametrize("make", [sgd, adamw_in_two_groups])
def test_torch_distributed_checkpoint_loads_it(make: Any) -> None:
    model, optimizer = trained(make)
    torch.manual_seed(0)
    other = Tied()
    other.load_state_dict(model.state_dict())
    into = make(other)
    state = copy.deepcopy(named_optimizer_state(optimizer, [model]))
    set_optimizer_state_dict(other, into, optim_state_dict=state)
    assert train(other, into, 3, seed=1) == train(model, optimizer, 3, seed=1)


@pytest.mark.parametrize("make", [sgd, adamw_in_two_groups, adamw_by_name])
@pytest.mark.parametrize("keyed", ["name", "index"])
def test_training_goes_on_as_if_never_interrupted(make: Any, keyed: str) -> None:
    model, optimizer = trained(make)
    state = copy.deepcopy(
        named_optimizer_state(optimizer, [model]) if keyed == "name" else optimizer.state_dict()
    )
    other = copy.deepcopy(model)
    into = make(other)
    load_named_optimizer_state(into, [other], state)
    assert train(other, into, 4, seed=1) == train(model, optimizer, 4, seed=1)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_neither_order_nor_grouping_of_parameters_matters(data: st.DataObject) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    x = torch.randn(5, 3)

    def grouped(of: nn.Module) -> Optimizer:
        order = data.draw(st.permutations(range(6)))
        cuts = sorted(data.draw(st.sets(st.integers(1, 5), max_size=3)))
        parameters = [list(of.parameters())[i] for i in order]
        bounds = [0, *cuts, 6]
        return AdamW(
            [{"params": parameters[a:b]} for a, b in itertools.pairwise(bounds)],
            lr=0.05,
        )

    def steps(of: nn.Module, optimizer: Optimizer) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            of(x).square().mean().backward()
            optimizer.step()

    optimizer = grouped(model)
    steps(model, optimizer)
    other = copy.deepcopy(model)
    into = grouped(other)
    load_named_optimizer_state(
        into, [other], copy.deepcopy(named_optimizer_state(optimizer, [model]))
    )
    steps(model, optimizer)
    steps(other, into)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_each_parameter_gets_the_options_of_its_saved_group() -> None:
    model, optimizer = trained(adamw_in_two_groups)
    state = named_optimizer_state(optimizer, [model])
    state["param_groups"].reverse()
    into = adamw_in_two_groups(model)
    for group in into.param_groups:
        group["lr"] = 99.0
    load_named_optimizer_state(into, [model], state)
    assert [group["lr"] for group in into.param_groups] == [0.01, 0.03]


def test_what_the_checkpoint_holds_beyond_is_ignored() -> None:
    model, optimizer = trained(adamw_in_two_groups)
    state = named_optimizer_state(optimizer, [model])
    part = AdamW(model.norm.parameters(), lr=1.0)
    load_named_optimizer_state(part, [model], state)
    assert part.param_groups[0]["lr"] == 0.03
    assert part.state[model.norm.weight]["step"].item() == 3
    assert len(part.state) == 2


def test_parameters_that_the_checkpoint_lacks_are_named() -> None:
    model, _ = trained(sgd)
    part = SGD(model.norm.parameters(), lr=0.1)
    with pytest.raises(CheckpointError) as caught:
        load_named_optimizer_state(sgd(model), [model], named_optimizer_state(part, [model]))
    assert str(caught.value) == (
        "the checkpoint's optimizer has no 'embed.weight', 'frozen.weight', 'frozen.bias', "
        "'out.bias'; it holds 'norm.weight', 'norm.bias'"
    )


def test_groups_that_differ_are_not_merged() -> None:
    model, optimizer = trained(adamw_in_two_groups)
    state = named_optimizer_state(optimizer, [model])
    one = AdamW(model.norm.parameters(), lr=1.0)
    one.add_param_group({"params": [model.embed.weight, model.out.bias]})
    with pytest.raises(CheckpointError) as caught:
        load_named_optimizer_state(one, [model], state)
    assert str(caught.value) == (
        "AdamW has one group for parameters that the checkpoint keeps in 2, with different 'lr', "
        "'weight_decay': 'embed.weight', 'out.bias'"
    )


def test_how_a_step_is_computed_stays_as_here() -> None:
    model, _ = trained(sgd)
    saved = AdamW(model.parameters(), lr=0.5, foreach=True)
    here = AdamW(model.parameters(), lr=0.1, foreach=False)
    for state in (named_optimizer_state(saved, [model]), saved.state_dict()):
        load_named_optimizer_state(here, [model], state)
        assert here.param_groups[0]["foreach"] is False
        assert here.param_groups[0]["lr"] == 0.5


def test_parameter_names_kept_by_the_optimizer_stay_right() -> None:
    model, optimizer = trained(adamw_by_name)
    state = named_optimizer_state(optimizer, [model])
    into = AdamW(reversed(list(model.named_parameters())), lr=0.1)
    load_named_optimizer_state(into, [model], state)
    assert into.param_groups[0]["param_names"][0] == "out.bias"


def test_state_of_no_parameter_is_carried() -> None:
    model, optimizer = trained(sgd)
    optimizer.state["shared"] = {"rounds": 4}  # type: ignore[index]
    into = sgd(model)
    load_named_optimizer_state(into, [model], named_optimizer_state(optimizer, [model]))
    assert into.state["shared"] == {"rounds": 4}  # type: ignore[index]


def test_several_modules_have_their_index_before_the_names() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = SGD([*b.parameters(), *a.parameters()], lr=0.1)
    state = named_optimizer_state(optimizer, [a, b])
    assert state["param_groups"][0]["params"] == ["1.weight", "1.bias", "0.weight", "0.bias"]


def test_a_parameter_of_no_module_is_an_error_that_says_what_to_do() -> None:
    optimizer = SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    with pytest.raises(CheckpointError) as caught:
        named_optimizer_state(optimizer, [nn.Linear(3, 2)])
    assert str(caught.value) == (
        "SGD holds a parameter of shape (2, 3) that belongs to no model that was set up; pass the "
        "model and its optimizer to fabric.setup() together"
    )


def test_index_keyed_groups_of_another_size_are_an_error() -> None:
    model, optimizer = trained(adamw_in_two_groups)
    with pytest.raises(CheckpointError) as caught:
        load_named_optimizer_state(sgd(model), [model], optimizer.state_dict())
    assert str(caught.value) == (
        "the checkpoint's optimizer does not fit this SGD: its groups hold 2 and 4 parameters, "
        "and here 6"
    )


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([], "it is a list, not a dict"),
        ({}, "it has no 'state'; it holds nothing"),
        ({"state": {}, "lr": 1}, "it has no 'param_groups'; it holds 'state', 'lr'"),
        ({"state": {}, "param_groups": [{}]}, "must be a dict with 'params'"),
        ({"state": 3, "param_groups": []}, "and its 'state' a dict"),
    ],
)
def test_what_is_no_optimizers_state_is_an_error(state: Any, words: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="this is not the state of an optimizer") as caught:
        load_named_optimizer_state(sgd(model), [model], state)
    assert words in str(caught.value)
