"""Nested collections: one walk for moving batches and for converting them.

Both walks treat the exact types that nearly every batch is made of in place, without a call for
each leaf: they run once per step, and a step must cost what it costs written by hand.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["map_leaves", "move_batch", "mover"]

# Leaves that cannot hold a tensor and cannot be moved. Subclasses take the slow way.
_PLAIN = frozenset({int, float, str, bool, bytes, complex, type(None)})


def map_leaves(data: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to every leaf of nested lists, tuples, mappings and dataclasses.

    Subclasses keep their class: named tuples, ``UserDict`` and its like, frozen dataclasses. A
    collection none of whose leaves changed is returned as it is, not copied; the others are
    shallow copies. Strings, numbers and None are kept without asking ``function``.
    """
    kind = type(data)
    if kind is Tensor:
        return function(data)
    changed: Any = None
    if kind is list or kind is tuple:
        for index, item in enumerate(data):
            new = function(item) if type(item) is Tensor else map_leaves(item, function)
            if new is not item:
                if changed is None:
                    changed = list(data)
                changed[index] = new
        if changed is None:
            return data
        return changed if kind is list else tuple(changed)
    if kind is dict:
        for key, item in data.items():
            new = function(item) if type(item) is Tensor else map_leaves(item, function)
            if new is not item:
                if changed is None:
                    changed = data.copy()
                changed[key] = new
        return data if changed is None else changed
    if kind in _PLAIN:
        return data
    if _is_collection(data):
        return _map_collection(data, partial(map_leaves, function=function))
    return data if isinstance(data, str | bytes | int | float) else function(data)


def move_batch(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor, and every object that has ``.to(device)``, on ``device``.

    Collections are walked as ``map_leaves`` does, except that one with a ``.to`` of its own (a
    packed sequence, a tokenizer's output) is asked to move itself. What is on the device already
    is returned as it is. Pinned memory is copied without waiting. Objects without ``.to`` are left
    alone.
    """
    kind = type(batch)
    if kind is Tensor:
        if batch.device == device:
            return batch
        return batch.to(device, non_blocking=batch.is_pinned())
    changed: Any = None
    if kind is list or kind is tuple:
        for index, item in enumerate(batch):
            if type(item) is Tensor and item.device == device:
                continue
            new = move_batch(item, device)
            if new is not item:
                if changed is None:
                    changed = list(batch)
                changed[index] = new
        if changed is None:
            return batch
        return changed if kind is list else tuple(changed)
    if kind is dict:
        for key, item in batch.items():
            if type(item) is Tensor and item.device == device:
                continue
            new = move_batch(item, device)
            if new is not item:
                if changed is None:
                    changed = batch.copy()
                changed[key] = new
        return batch if changed is None else changed
    if kind in _PLAIN:
        return batch
    return _move_other(batch, device)


def mover(device: torch.device, *, on_host: bool) -> Callable[[Any], Any]:
    """``move_batch`` to ``device``, with what can be known beforehand settled once.

    ``on_host``: the device's memory is the host's. Where this torch has no accelerator either,
    there is no other place for a tensor to be, and a batch of plain tensors is not asked where
    they are: that alone would be most of what a batch that need not be moved costs.
    """
    if on_host and torch.accelerator.current_accelerator() is None:
        return partial(_move_to_only_place, device=device)
    return partial(move_batch, device=device)


def _move_to_only_place(batch: Any, device: torch.device) -> Any:
    return batch if _is_plain(batch) else move_batch(batch, device)


def _is_plain(data: Any) -> bool:
    """Whether there is nothing but exact tensors, numbers and strings in exact collections."""
    kind = type(data)
    if kind is dict:
        data = data.values()
    elif kind is not list and kind is not tuple:
        return kind is Tensor or kind in _PLAIN
    for item in data:
        kind = type(item)
        if kind is Tensor:
            continue
        if kind is tuple or kind is list:
            # Many batches are lists of pairs: a call for each would be half of the time.
            if len(item) == 2:
                first, second = item
                if type(first) is Tensor and type(second) is Tensor:
                    continue
            for inner in item:
                if type(inner) is not Tensor and not _is_plain(inner):
                    return False
        elif not _is_plain(item):
            return False
    return True


def _move_other(item: Any, device: torch.device) -> Any:
    if isinstance(item, Tensor):
        if item.device == device:
            return item
        return item.to(device, non_blocking=item.is_pinned())
    if _is_collection(item):
        # On the class: an attribute dictionary may have a key, and a dataclass a field, "to".
        if not callable(getattr(type(item), "to", None)):
            return _map_collection(item, partial(move_batch, device=device))
    elif isinstance(item, type) or not callable(getattr(item, "to", None)):
        return item
    moved = item.to(device)
    # Some classes move themselves in place and return nothing.
    return item if moved is None else moved


def _is_collection(data: Any) -> bool:
    return isinstance(data, list | tuple | Mapping) or (
        dataclasses.is_dataclass(data) and not isinstance(data, type)
    )


def _map_collection(data: Any, visit: Callable[[Any], Any]) -> Any:
    """``data`` with ``visit`` applied to what it holds: itself, or a copy where that changed."""
    if isinstance(data, Mapping):
        return _map_mapping(data, visit)
    if isinstance(data, list | tuple):
        new = [visit(item) for item in data]
        if all(map(_same, new, data)):
            return data
        if isinstance(data, tuple):
            kind: Any = type(data)
            return kind(*new) if hasattr(data, "_fields") else kind(new)
        held = copy.copy(data)
        held[:] = new
        return held
    return _map_dataclass(data, visit)


def _map_mapping(data: Mapping[Any, Any], visit: Callable[[Any], Any]) -> Any:
    old = dict(data.items())
    new = {key: visit(value) for key, value in old.items()}
    if all(new[key] is value for key, value in old.items()):
        return data
    kind: Any = type(data)
    # A copy keeps what the constructor would ask for: a default factory, encodings, options.
    held: Any
    if isinstance(data, dict) or hasattr(kind, "__copy__"):
        held = copy.copy(data)
    elif isinstance(data, MutableMapping) and hasattr(kind, "copy"):
        held = kind.copy(data)
    else:
        return kind(new)
    for key, value in new.items():
        if value is not old[key]:
            held[key] = value
    return held


def _map_dataclass(data: Any, visit: Callable[[Any], Any]) -> Any:
    held = None
    for field in dataclasses.fields(data):
        if not hasattr(data, field.name):  # init=False, and not set yet
            continue
        old = getattr(data, field.name)
        new = visit(old)
        if new is not old:
            if held is None:
                held = copy.copy(data)
            # Frozen classes refuse the ordinary way.
            object.__setattr__(held, field.name, new)
    return data if held is None else held


def _same(one: Any, other: Any) -> bool:
    return one is other
