"""Collectives on nested collections, with a partner that is made up."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.distributed
from torch import Tensor

from torchweft import Fabric
from torchweft.api import Alone, RankInfo, Run
from torchweft.errors import InvalidRequest
from torchweft.gathering import gather_data, reduce_data


class Doubled(Alone):
    """As if another process held the same."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def all_reduce(self, tensor: Tensor, op: str = "mean", group: Any = None) -> Tensor:
        self.asked.append((op, group))
        reduced = super().all_reduce(tensor, op, group)
        return reduced * 2 if op == "sum" else reduced

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        self.asked.append(("gather", (group, sync_grads)))
        return super().all_gather(tensor, group, sync_grads).repeat(2, *[1] * tensor.ndim)


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.fixture
def alone() -> Run:
    fabric = Fabric(accelerator="cpu", devices=1)
    return fabric._run("test")


@pytest.fixture
def two(alone: Run) -> Run:
    alone.rank = RankInfo(world_size=2)
    alone.collectives = Doubled()
    return alone


def test_leaves_become_tensors_and_collections_stay(two: Run) -> None:
    given = OrderedDict(a=[1, 2.5], b=Pair(True, numpy.array([3])), c=(torch.ones(2, 3),))
    gathered = gather_data(two, given, None, False)
    assert [type(gathered[key]) for key in "abc"] == [list, Pair, tuple]
    assert gathered["a"][0].tolist() == [1, 1]
    assert gathered["a"][1].tolist() == [2.5, 2.5]
    assert gathered["b"].first.tolist() == [True, True]
    assert gathered["b"].second.tolist() == [[3], [3]]
    assert gathered["c"][0].shape == (2, 2, 3)


def test_in_a_run_of_one_process_shapes_stay(alone: Run) -> None:
    assert gather_data(alone, {"a": [torch.ones(2, 3)]}, None, False)["a"][0].shape == (2, 3)
    assert gather_data(alone, 3, None, False).shape == ()


def test_what_is_asked_for_is_passed_on(two: Run) -> None:
    group = object()
    gather_data(two, 1.0, group, True)
    reduce_data(two, 1.0, group, "max")
    assert two.collectives.asked == [("gather", (group, True)), ("max", group)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("written", "op"),
    [
        ("mean", "mean"),
        ("avg", "mean"),
        ("AVG", "mean"),
        ("SUM", "sum"),
        (torch.distributed.ReduceOp.AVG, "mean"),
        (torch.distributed.ReduceOp.PRODUCT, "product"),
    ],
)
def test_names_of_reductions(two: Run, written: Any, op: str) -> None:
    reduce_data(two, 1.0, None, written)
    assert two.collectives.asked == [(op, None)]  # type: ignore[attr-defined]


def test_tensors_are_reduced_in_place_and_once(two: Run) -> None:
    tensor, integers = torch.ones(2), torch.ones(2, dtype=torch.int64)
    reduced = reduce_data(two, {"a": tensor, "b": [tensor]}, None, "sum")
    assert reduced["a"] is tensor
    assert reduced["b"][0] is tensor
    assert tensor.tolist() == [2, 2]
    mean = reduce_data(two, integers, None, "mean")
    assert mean is not integers
    assert mean.dtype == torch.float32


def test_arrays_and_what_cannot_be_written_to_stay_as_they_are(two: Run) -> None:
    array = numpy.ones(2)
    assert reduce_data(two, array, None, "sum").tolist() == [2, 2]
    assert array.tolist() == [1, 1]
    expanded = torch.ones(1).expand(2)
    assert reduce_data(two, expanded, None, "sum").tolist() == [2, 2]
    assert expanded.tolist() == [1, 1]


@pytest.mark.parametrize("value", ["text", None, object(), {1, 2}])
def test_what_cannot_be_reduced_is_an_error(two: Run, value: Any) -> None:
    for caller, function in (
        ("all_gather", lambda: gather_data(two, [1, value], None, False)),
        ("all_reduce", lambda: reduce_data(two, [1, value], None, "sum")),
    ):
        with pytest.raises(
            InvalidRequest,
            match=rf"^fabric.{caller}\(\) was given a {type(value).__name__}; it takes tensors, "
            r"numbers, arrays and collections of them. For other objects use fabric.broadcast\(\)$",
        ):
            function()
