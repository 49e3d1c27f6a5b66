"""Nested collections: one walk for moving batches and for converting them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["map_leaves", "move_batch"]


def map_leaves(data: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to every leaf of nested lists, tuples, mappings and dataclasses.

    A collection none of whose leaves changed is returned as it is, not copied.
    """
    kind = type(data)
    if kind is Tensor:
        return function(data)
    if kind is list or kind is tuple:
        changed = [map_leaves(item, function) for item in data]
        if all(new is old for new, old in zip(changed, data, strict=True)):
            return data
        return changed if kind is list else tuple(changed)
    if isinstance(data, str | bytes | int | float) or data is None:
        return data
    if isinstance(data, Mapping):
        new = {key: map_leaves(value, function) for key, value in data.items()}
        if all(new[key] is data[key] for key in data):
            return data
        return _rebuild_mapping(data, new)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return kind(*(map_leaves(item, function) for item in data))
    if isinstance(data, list | tuple):
        return kind(map_leaves(item, function) for item in data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type) and not hasattr(data, "to"):
        return _rebuild_dataclass(data, function)
    return function(data)


def _rebuild_mapping(data: Mapping[Any, Any], new: dict[Any, Any]) -> Any:
    kind: Any = type(data)
    if kind is dict:
        return new
    if hasattr(data, "default_factory"):
        return kind(data.default_factory, new)
    return kind(new)


def _rebuild_dataclass(data: Any, function: Callable[[Any], Any]) -> Any:
    # Written into a shallow copy, so that fields with init=False and frozen classes work too.
    new = object.__new__(type(data))
    new_state = {
        f.name: map_leaves(getattr(data, f.name), function) for f in dataclasses.fields(data)
    }
    for name, value in {**getattr(data, "__dict__", {}), **new_state}.items():
        object.__setattr__(new, name, value)
    return new


def move_batch(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor, and every object that has ``.to(device)``, on ``device``.

    Pinned memory is copied without waiting. Objects without ``.to`` are left alone.
    """

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.device == device:
                return leaf
            return leaf.to(device, non_blocking=leaf.is_pinned())
        to = getattr(leaf, "to", None)
        if to is None or isinstance(leaf, type):
            return leaf
        moved = to(device)
        # Some classes move themselves in place and return nothing.
        return leaf if moved is None else moved

    return map_leaves(batch, move)
