"""What a checkpoint may hold: values that load without running code from the file."""

from __future__ import annotations

import dataclasses
import io
import reprlib
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchweft.errors import CheckpointError

__all__ = ["check_loadable", "without_numpy_scalars"]

# Types that always load. Tensors are trusted too, whatever their class, so that checking a large
# one does not copy it; the file itself is checked after it is written.
_KNOWN = frozenset({str, int, float, bool, complex, bytes, type(None), torch.dtype, torch.Size})

_INSTEAD: tuple[tuple[type, str], ...] = (
    (np.ndarray, "torch.from_numpy(value)"),
    (nn.Module, "value.state_dict()"),
    (Namespace, "vars(value)"),
    (Enum, "value.value"),
    (PurePath, "str(value)"),
    (int, "str(value)"),
    (bytes, "bytearray(value)"),
    (frozenset, "set(value)"),
    (defaultdict, "dict(value)"),
    (deque, "list(value)"),
    (range, "list(value)"),
    (type, "its name"),
    (FunctionType, "its name"),
    (BuiltinFunctionType, "its name"),
)


def without_numpy_scalars(content: Any) -> Any:
    """``content`` with Python numbers for NumPy's; a container without any is not copied.

    A mean or a best accuracy is often a NumPy scalar, equal to a Python number in all but its
    class, which could not be loaded. Arrays stay: they would come back as something else.
    """
    return _converted(content, {})


def _converted(value: Any, done: dict[int, Any]) -> Any:
    kind = type(value)
    if isinstance(value, np.generic):
        number = value.item()
        return number if type(number) in _KNOWN else value
    if kind not in (dict, OrderedDict, list, tuple):
        return value
    if id(value) in done:
        return done[id(value)]
    # A container that holds itself meets itself here, and is left for torch to write.
    done[id(value)] = value
    old = (
        [part for item in value.items() for part in item]
        if isinstance(value, dict)
        else list(value)
    )
    new = [_converted(part, done) for part in old]
    if any(a is not b for a, b in zip(old, new, strict=True)):
        done[id(value)] = _rebuilt(value, new)
    return done[id(value)]


def _rebuilt(value: Any, parts: list[Any]) -> Any:
    if isinstance(value, dict):
        mapping = type(value)(zip(parts[::2], parts[1::2], strict=True))
        if isinstance(value, OrderedDict):
            vars(mapping).update(vars(value))  # a module's state carries its versions there
        return mapping
    return type(value)(parts)


def check_loadable(content: Any, *, thorough: bool = False) -> None:
    """Find a value that ``torch.load(weights_only=True)`` would refuse.

    ``thorough``: try every value by itself, also those of well-known types.

    Raises ``CheckpointError`` with the value's place, its type and what to save in its stead.
    """
    for path, value in _leaves(content, "state", set()):
        if not thorough and (type(value) in _KNOWN or isinstance(value, Tensor)):
            continue
        problem = _problem(value)
        if problem:
            raise CheckpointError(_refusal(path, value, problem))


def _leaves(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if kind not in (dict, OrderedDict, Counter, list, tuple, set):
        yield path, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) not in _KNOWN:
                yield from _leaves(key, f"the key {reprlib.repr(key)} of {path}", seen)
            yield from _leaves(item, f"{path}[{reprlib.repr(key)}]", seen)
        if kind is OrderedDict and vars(value):
            for name, item in vars(value).items():
                yield from _leaves(item, f"{path}.{name}", seen)
    elif isinstance(value, set):
        for item in value:
            yield from _leaves(item, f"an element of {path}", seen)
    else:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]", seen)


def _problem(value: Any) -> str:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:
        return f"it cannot be pickled ({error})"
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True, map_location="cpu")
    except Exception:
        return "a file that loads without running code cannot hold it"
    return ""


def _refusal(path: str, value: Any, problem: str) -> str:
    kind = type(value)
    builtin = kind.__module__ == "builtins"
    name = kind.__qualname__ if builtin else f"{kind.__module__}.{kind.__qualname__}"
    ways = [f"save {_instead(value)} in its place"]
    if not builtin and not isinstance(value, np.ndarray | np.generic | nn.Module):
        ways.append("give its class state_dict() and load_state_dict()")
        ways.append(
            f"call torch.serialization.add_safe_globals([{kind.__qualname__}]) before saving and "
            "loading, if loading it is harmless"
        )
    return f"{path} is of type {name}, and {problem}; {', or '.join(ways)}"


def _instead(value: Any) -> str:
    for kind, words in _INSTEAD:
        if isinstance(value, kind):
            return words
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return "value._asdict()"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "dataclasses.asdict(value)"
    if isinstance(value, Mapping):
        return "dict(value)"
    return "a dict of what it is made from"
