"""Groups of micro-batches: equal to the large batch, and not to be got wrong."""

from __future__ import annotations

import gc
import pickle
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchweft import Fabric
from torchweft.accumulation import Groups
from torchweft.api import Strategy
from torchweft.errors import InvalidRequest, Misuse


class Noting(Strategy):
    """Notes what it was told of each micro-batch; cannot leave out a synchronisation."""

    name = "noting"
    processes = "one"

    def __init__(self, **cannot: str) -> None:
        self.cannot = cannot
        self.told: list[Any] = []

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Any:
        self.told.append(last)
        yield
        self.told.append("left")


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision="64-true")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def set_up(fabric: Fabric, lr: float = 0.1) -> tuple[Any, Any]:
    model = net()
    made: tuple[Any, Any] = fabric.setup(model, Adam(model.parameters(), lr=lr))
    return made


def samples(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, 3, dtype=torch.float64, generator=generator)
    return x, torch.randn(number, 2, dtype=torch.float64, generator=generator)


def large_batches(x: torch.Tensor, y: torch.Tensor, size: int, epochs: int) -> nn.Module:
    """The same training by a plain loop over batches of ``size``."""
    model = net()
    optimizer = Adam(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for first in range(0, len(x), size):
            optimizer.zero_grad()
            part = slice(first, first + size)
            nn.functional.mse_loss(model(x[part]), y[part]).backward()
            optimizer.step()
    return model


def backward(fabric: Fabric, model: Any, value: float = 1.0) -> None:
    fabric.backward(model(torch.full((1, 3), value, dtype=torch.float64)).sum())


def run_to(fabric: Fabric, model: Any, indices: range, **options: Any) -> None:
    for index in indices:
        with fabric.accumulate(model, index=index, **options):
            backward(fabric, model)


# -- the numbers -----------------------------------------------------------------------------------


# 24 samples are whole groups, 30 end with a short one.
@pytest.mark.parametrize("number", [24, 30])
@pytest.mark.parametrize("sized", [True, False])
def test_groups_train_as_the_large_batch_does(fabric: Fabric, number: int, sized: bool) -> None:
    x, y = samples(number)
    model, optimizer = set_up(fabric)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, y), batch_size=2))
    steps = 0
    for _ in range(2):
        for index, (inputs, targets) in enumerate(loader):
            with fabric.accumulate(
                model,
                steps=4,
                index=index,
                total=loader if sized else len(loader),
                scale_loss=True,
            ) as acc:
                fabric.backward(nn.functional.mse_loss(model(inputs), targets))
            if acc.should_step:
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
    assert steps == 2 * -(-number // 8)
    expected = large_batches(x, y, 8, 2).state_dict()
    for name, value in model.state_dict().items():
        assert (value - expected[name]).abs().max() < 1e-10


def test_without_scaling_losses_are_summed(fabric: Fabric) -> None:
    x, y = samples(8)
    model, _ = set_up(fabric)
    for index in range(4):
        with fabric.accumulate(model, steps=4, index=index):
            part = slice(2 * index, 2 * index + 2)
            fabric.backward(nn.functional.mse_loss(model(x[part]), y[part]))
    reference = net()
    (nn.functional.mse_loss(reference(x), y) * 4).backward()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=0, atol=1e-10)


def test_the_loss_stays_what_it_was_and_backward_outside_is_not_divided(fabric: Fabric) -> None:
    model, _ = set_up(fabric)
    (weight,) = [p for n, p in model.named_parameters() if n == "2.bias"]
    loss = model(torch.ones(1, 3, dtype=torch.float64)).sum()
    value = loss.item()
    with fabric.accumulate(model, steps=4, index=3, scale_loss=True):
        fabric.backward(loss)
    assert loss.item() == value
    assert weight.grad.tolist() == [0.25, 0.25]
    backward(fabric, model)
    assert weight.grad.tolist() == [1.25, 1.25]


def test_scaling_ends_with_the_block_that_raises(fabric: Fabric) -> None:
    model, _ = set_up(fabric)
    with pytest.raises(KeyError), fabric.accumulate(model, steps=2, index=1, scale_loss=True):
        raise KeyError
    backward(fabric, model)
    assert model[2].bias.grad.tolist() == [1.0, 1.0]


def test_several_models(fabric: Fabric) -> None:
    one, first = set_up(fabric)
    two, second = set_up(fabric)
    for index in range(2):
        with fabric.accumulate([one, two], steps=2, index=index, scale_loss=True) as acc:
            backward(fabric, one)
            backward(fabric, two)
        assert acc.should_step is (index == 1)
    first.step()
    second.step()
    assert one[2].bias.grad.tolist() == two[2].bias.grad.tolist() == [1.0, 1.0]


# -- groups ----------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_every_micro_batch_is_in_one_group_and_each_group_ends_once(
    steps: int, total: int, sized: bool
) -> None:
    groups, strategy = Groups(), Noting()
    module = nn.Linear(1, 1)
    seen = []
    for index in range(total):
        with groups.accumulate(
            strategy, [module], steps=steps, index=index, total=range(total) if sized else total
        ) as acc:
            assert index in acc.group
            assert acc.group_size == len(acc.group) <= steps
        if acc.should_step:
            seen.append(list(acc.group))
    assert [index for group in seen for index in group] == list(range(total))
    assert all(len(group) == steps for group in seen[:-1])
    assert [t for t in strategy.told if t != "left"] == [
        any(index == group[-1] for group in seen) for index in range(total)
    ]


def test_without_a_total_groups_are_whole(fabric: Fabric) -> None:
    model, _ = set_up(fabric)
    asked = [fabric.accumulate(model, steps=3, index=i).should_step for i in range(7)]
    assert asked == [False, False, True, False, False, True, False]


def test_numbers_of_other_libraries(fabric: Fabric) -> None:
    model, _ = set_up(fabric)
    acc = fabric.accumulate(
        model, steps=numpy.int64(2), index=torch.tensor(4), total=numpy.int32(5)
    )
    assert (acc.index, acc.group, acc.should_step) == (4, range(4, 5), True)


@pytest.mark.parametrize("cannot", [{}, {"no_backward_sync": "it has one graph a step"}])
def test_a_strategy_is_told_of_the_last_even_where_it_cannot_leave_out(cannot: Any) -> None:
    strategy = Noting(**cannot)
    fabric = Fabric(accelerator="cpu", strategy=strategy, precision="64-true")
    model, optimizer = set_up(fabric)
    run_to(fabric, model, range(3), steps=2, total=3)
    assert strategy.told == [False, "left", True, "left", True, "left"]
    optimizer.step()


# -- wrong numbers ---------------------------------------------------------------------------------


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(int, 1)


WRONG = [
    ({"steps": 0}, r"accumulate\(steps=0\): a group has 1 micro-batch or more; steps=1"),
    ({"steps": 2.0}, r"accumulate\(steps=2.0\): a group has 1 micro-batch or more"),
    ({"steps": True}, r"accumulate\(steps=True\): a group has"),
    ({"index": -1}, r"accumulate\(index=-1\): micro-batches are counted 0, 1, 2, …, as in 'for"),
    ({"index": None}, r"accumulate\(index=None\): micro-batches are counted 0, 1, 2"),
    (
        {"index": 6, "total": 6},
        (
            r"accumulate\(index=6, total=6\): micro-batches are counted from 0 up to total - 1; "
            "count from 0 in every epoch, and give the total of the loader that the loop goes "
            "through"
        ),
    ),
    ({"total": [1]}, r"accumulate\(index=4, total=1\): micro-batches are counted"),
    (
        {"total": DataLoader(Endless())},
        (
            r"accumulate\(total=\): the DataLoader given has no length; give the number of "
            "micro-batches, or leave total out and end the loop with a whole group"
        ),
    ),
    ({"total": 5.0}, r"accumulate\(total=\): the float given has no length"),
    ({"model": []}, r"accumulate\(\[\]\) was given no model; give one, or several"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_numbers(fabric: Fabric, wrong: dict[str, Any], message: str) -> None:
    model, _ = set_up(fabric)
    arguments = {"model": model, "steps": 4, "index": 4, **wrong}
    with pytest.raises(InvalidRequest, match=message):
        fabric.accumulate(**arguments)


def test_models_have_to_be_set_up(fabric: Fabric) -> None:
    model, optimizer = set_up(fabric)
    for wrong in (net(), [model, net()], optimizer):
        with pytest.raises(
            Misuse, match=r"accumulate\(\) was given a .* that was not set up; pass"
        ):
            fabric.accumulate(wrong, steps=2, index=0)


# -- in the middle of a group ----------------------------------------------------------------------


def test_a_step_in_the_middle_of_a_group(fabric: Fabric) -> None:
    model, optimizer = set_up(fabric)
    run_to(fabric, model, range(2), steps=4, total=10)
    message = (
        r"Adam.step\(\) was called in the middle of a group, after 2 of 4 micro-batches \(index "
        r"1\), and their gradients are not synchronised between the processes; step where "
        r"acc.should_step is true. Where the data ends there, give total=len\(loader\), which "
        r"closes a short last group; to give the group up, call zero_grad\(\)"
    )
    with pytest.raises(Misuse, match=message):
        optimizer.step()
    run_to(fabric, model, range(2, 4), steps=4, total=10)
    optimizer.step()


def test_other_optimizers_may_step(fabric: Fabric) -> None:
    model, _ = set_up(fabric)
    other, its = set_up(fabric)
    run_to(fabric, model, range(1), steps=2)
    backward(fabric, other)
    its.step()
    plain = nn.Linear(1, 1)
    plain(torch.ones(1)).backward()
    SGD(plain.parameters()).step()


def test_gradients_lost_in_the_middle_of_a_group(fabric: Fabric) -> None:
    model, optimizer = set_up(fabric)
    run_to(fabric, model, range(4, 6), steps=4)
    optimizer.zero_grad()
    message = (
        r"the gradients of micro-batches 4 to 5 are gone: zero_grad\(\) was called in the middle "
        r"of a group of 4; call it behind optimizer.step\(\), where acc.should_step is true"
    )
    with pytest.raises(Misuse, match=message):
        run_to(fabric, model, range(6, 7), steps=4)


def test_a_group_that_was_left(fabric: Fabric) -> None:
    model, optimizer = set_up(fabric)
    run_to(fabric, model, range(8, 10), steps=4)
    message = (
        r"accumulate\(index=0\) begins another group, but the one before was left after 2 of 4 "
        r"micro-batches \(index 9\), with its gradients still there; give total=len\(loader\), "
        r"which closes a short last group, or call zero_grad\(\) to give the group up"
    )
    with pytest.raises(Misuse, match=message):
        run_to(fabric, model, range(1), steps=4)
    # The way out that the message names.
    optimizer.zero_grad()
    run_to(fabric, model, range(4), steps=4)
    optimizer.step()


def test_an_index_that_stands_still(fabric: Fabric) -> None:
    model, _ = set_up(fabric)
    run_to(fabric, model, range(1), steps=4)
    message = (
        r"accumulate\(index=0\) came twice in a group of 4; index counts micro-batches, as in 'for "
        r"index, batch in enumerate\(loader\)', and one block holds all of a micro-batch"
    )
    with pytest.raises(Misuse, match=message):
        run_to(fabric, model, range(1), steps=4)


def test_a_group_that_was_given_up_does_not_hinder_other_loops(fabric: Fabric) -> None:
    model, optimizer = set_up(fabric)
    run_to(fabric, model, range(1), steps=4)
    optimizer.zero_grad()
    backward(fabric, model)
    optimizer.step()
    run_to(fabric, model, range(4), steps=4)
    optimizer.step()


def test_a_micro_batch_may_be_left_out_or_tried_again(fabric: Fabric) -> None:
    model, optimizer = set_up(fabric)
    run_to(fabric, model, range(1), steps=4)
    with pytest.raises(KeyError), fabric.accumulate(model, steps=4, index=2):
        raise KeyError
    run_to(fabric, model, range(2, 4), steps=4)
    optimizer.step()


def test_gradients_that_cannot_be_seen_are_not_judged(fabric: Fabric) -> None:
    model, optimizer = set_up(fabric)
    for index in (0, 0, 4, 1):
        with fabric.accumulate(model, steps=4, index=index):
            pass
    optimizer.step()


def test_nothing_is_left_behind_in_torch() -> None:
    before = dict(_global_optimizer_pre_hooks)
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    model, optimizer = set_up(fabric)
    run_to(fabric, model, range(3), steps=4)
    assert len(_global_optimizer_pre_hooks) == len(before) + 1
    run_to(fabric, model, range(3, 4), steps=4)
    assert _global_optimizer_pre_hooks == before
    optimizer.zero_grad()
    run_to(fabric, model, range(1), steps=4)
    fabric._groups = Groups()
    gc.collect()
    assert _global_optimizer_pre_hooks == before


def test_a_fabric_with_an_open_group_can_be_pickled(fabric: Fabric) -> None:
    model, _ = set_up(fabric)
    run_to(fabric, model, range(1), steps=4)
    copied = pickle.loads(pickle.dumps(fabric))
    again, optimizer = set_up(copied)
    run_to(copied, again, range(4), steps=4)
    optimizer.step()
