"""Collectives on what users have: nested collections of tensors, numbers and arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from torchweft.api import Run
from torchweft.errors import InvalidRequest

__all__ = ["gather_data", "reduce_data"]


def gather_data(run: Run, data: Any, group: Any, sync_grads: bool, stack: bool = False) -> Any:
    """Every leaf of all processes, stacked: shape ``(processes, *shape)``.

    In a run of one process a leaf keeps its shape, as ``Fabric.all_gather`` promises, unless
    ``stack``.
    """
    alone = run.rank.world_size == 1 and not stack

    def gather(leaf: Any) -> Tensor:
        tensor = _tensor(run, leaf, "all_gather")
        gathered = run.collectives.all_gather(tensor, group, sync_grads)
        return gathered[0] if alone else gathered

    return _map(data, gather)


def reduce_data(run: Run, data: Any, group: Any, reduce_op: Any) -> Any:
    """Every leaf reduced over all processes; a number becomes a tensor.

    A tensor is changed in place, and returned itself, where it can hold the result.
    ``reduce_op`` is a word, or one of ``torch.distributed.ReduceOp``.
    """
    word = str(getattr(reduce_op, "name", reduce_op)).lower()
    op = "mean" if word == "avg" else word
    reduced = _map(
        data, lambda leaf: run.collectives.all_reduce(_tensor(run, leaf, "all_reduce"), op, group)
    )
    # Afterwards, so that a tensor that occurs twice is not reduced twice.
    return _map(data, _put_back, reduced)


def _put_back(leaf: Any, reduced: Tensor) -> Tensor:
    if not isinstance(leaf, Tensor) or leaf.dtype != reduced.dtype:
        return reduced
    try:
        with torch.no_grad():
            return leaf.copy_(reduced)
    except RuntimeError:  # an expanded tensor, or one of inference mode, cannot be written to
        return reduced


def _tensor(run: Run, leaf: Any, caller: str) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, bool | int | float | complex | numpy.ndarray | numpy.generic):
        return torch.tensor(leaf, device=run.device)
    raise InvalidRequest(
        f"fabric.{caller}() was given a {type(leaf).__name__}; it takes tensors, numbers, arrays "
        "and collections of them. For other objects use fabric.broadcast()"
    )


def _map(data: Any, function: Callable[..., Any], *others: Any) -> Any:
    """``function`` of every leaf, and of the leaves at its place in ``others``."""
    if isinstance(data, Mapping):
        return {
            key: _map(value, function, *(other[key] for other in others))
            for key, value in data.items()
        }
    if isinstance(data, list | tuple):
        items = [_map(item, function, *there) for item, *there in zip(data, *others, strict=True)]
        return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)
    return function(data, *others)
