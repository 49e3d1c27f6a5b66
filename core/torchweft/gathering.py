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


def gather_data(run: Run, data: Any, group: Any, sync_grads: bool) -> Any:
    """Every leaf of all processes, stacked: shape ``(processes, *shape)``."""
    return _map(
        data,
        lambda leaf: run.collectives.all_gather(
            _tensor(run, leaf, "all_gather"), group, sync_grads
        ),
    )


def reduce_data(run: Run, data: Any, group: Any, reduce_op: str) -> Any:
    """Every leaf reduced over all processes; a number becomes a tensor."""
    op = "mean" if reduce_op == "avg" else reduce_op
    return _map(
        data, lambda leaf: run.collectives.all_reduce(_tensor(run, leaf, "all_reduce"), op, group)
    )


def _tensor(run: Run, leaf: Any, caller: str) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, bool | int | float | complex | numpy.ndarray | numpy.generic):
        return torch.as_tensor(leaf, device=run.device)
    raise InvalidRequest(
        f"fabric.{caller}() was given a {type(leaf).__name__}; it takes tensors, numbers, arrays "
        "and collections of them. For other objects use fabric.broadcast()"
    )


def _map(data: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(data, Mapping):
        return {key: _map(value, function) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(_map(item, function) for item in data))
    if isinstance(data, list | tuple):
        return type(data)(_map(item, function) for item in data)
    return function(data)
