"""Nested dicts, lists and tuples of a checkpoint, and the values in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from torchweft.errors import CheckpointError

__all__ = ["has_state", "key_list", "on_host", "rebuilt", "sequence_like", "whole"]


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
    """Tensors whole and on the CPU; ``keep=False`` takes part in gathering alone."""
    if isinstance(value, Tensor):
        gathered = whole(value)
        if not keep:
            return None
        if gathered.is_meta:
            raise CheckpointError(
                f"{path} is on the meta device and holds no data; fill it before saving"
            )
        return gathered if gathered.device.type == "cpu" else gathered.detach().cpu()
    return rebuilt(value, lambda item, key: on_host(item, f"{path}[{key!r}]", keep=keep))


def whole(value: Any) -> Any:
    """A sharded tensor gathered; importing DTensor to ask for its class would take a second."""
    gather = getattr(value, "full_tensor", None) if isinstance(value, Tensor) else None
    return value if gather is None else gather()


def key_list(mapping: Mapping[str, Any], hidden: str = "") -> str:
    """Its keys, quoted, in a sentence."""
    return ", ".join(repr(key) for key in mapping if key != hidden) or "nothing"
