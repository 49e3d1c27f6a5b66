"""Nested dicts, lists and tuples of a checkpoint, and the values in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from torchweft.errors import CheckpointError

__all__ = [
    "has_state",
    "is_sharded",
    "key_list",
    "local",
    "on_host",
    "rebuilt",
    "sequence_like",
    "whole",
]


def has_state(value: Any) -> bool:
    """Whether it is an object with ``state_dict()``."""
    return not isinstance(value, type) and callable(getattr(value, "state_dict", None))


def rebuilt(value: Any, function: Callable[[Any, Any], Any]) -> Any:
    """``value``, or a copy of a dict, list or tuple some of whose items ``function`` changed.

    ``function`` gets an item and its key or index. Items are visited in order everywhere.
    """
    if isinstance(value, dict):
        new = {key: function(item, key) for key, item in value.items()}
        if all(new[key] is item for key, item in value.items()):
            return value
        # A shallow copy keeps the class and what torch attaches to a module's state.
        copied = copy.copy(value)
        copied.update(new)
        return copied
    if isinstance(value, list | tuple):
        items = [function(item, index) for index, item in enumerate(value)]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return sequence_like(value, items)
    return value


def sequence_like(old: Any, items: list[Any]) -> Any:
    """A list, tuple or named tuple as ``old`` is one."""
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def on_host(value: Any, path: str, *, keep: bool) -> Any:
    """Tensors whole and on the CPU; ``keep=False`` takes part in gathering alone.

    What fails here is raised when all is gathered, since the other ranks go on.
    """
    failures: list[Exception] = []

    def moved(item: Any, where: str) -> Any:
        if not isinstance(item, Tensor):
            return rebuilt(item, lambda each, key: moved(each, f"{where}[{key!r}]"))
        gathered = whole(item)
        if not keep or failures:
            return None
        try:
            return _moved(gathered, where)
        except Exception as error:
            failures.append(error)

    host = moved(value, path)
    if failures:
        raise failures[0]
    return host


def _moved(tensor: Tensor, path: str) -> Tensor:
    if tensor.is_meta:
        raise CheckpointError(
            f"{path} is on the meta device and holds no data; fill it before saving"
        )
    return tensor if tensor.device.type == "cpu" else tensor.detach().cpu()


def is_sharded(value: Any) -> bool:
    """Whether it is a tensor that is spread over a mesh of processes."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def local(value: Any) -> Tensor:
    """What this rank has of a tensor."""
    held: Tensor = value.to_local() if is_sharded(value) else value
    return held


def whole(value: Any) -> Any:
    """A sharded tensor gathered; importing DTensor to ask for its class would take a second."""
    gather = getattr(value, "full_tensor", None) if isinstance(value, Tensor) else None
    return value if gather is None else gather()


def key_list(mapping: Mapping[str, Any], hidden: str = "") -> str:
    """Its keys, quoted, in a sentence."""
    return ", ".join(repr(key) for key in mapping if key != hidden) or "nothing"
