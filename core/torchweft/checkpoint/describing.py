"""What a checkpoint holds, for a person or a program that asks; its tensors stay on the disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from torchweft.checkpoint.layouts import LaidOut
from torchweft.checkpoint.opening import open_checkpoint
from torchweft.checkpoint.reading import Folder
from torchweft.checkpoint.restoring import Source
from torchweft.checkpoint.state import RESERVED
from torchweft.errors import listed

__all__ = ["describe", "is_model"]


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file or a folder, by plain values that can be written as JSON.

    Raises ``CheckpointError`` where none is.
    """
    content, source = open_checkpoint(path, mapped=True)
    manifest = source.manifest if isinstance(source, Folder) else None
    names = ("torchweft", "torch", "world_size", "strategy", "precision", "format")
    return {
        "path": os.fspath(path),
        "form": "folder" if isinstance(source, Folder) else "file",
        "bytes": sum(_sizes(os.fspath(path))),
        **{name: None if manifest is None else getattr(manifest, name) for name in names},
        "parts": [_part(key, value, source) for key, value in _items(content)],
    }


def is_model(value: Any) -> bool:
    """Whether it is what a model's ``state_dict()`` gives."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    if hasattr(value, "_metadata"):
        return True
    return bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _sizes(path: str) -> Iterator[int]:
    if os.path.isdir(path):
        for inside, _, names in os.walk(path):
            for name in names:
                yield os.path.getsize(os.path.join(inside, name))
    else:
        yield os.path.getsize(path)


def _items(content: Any) -> list[tuple[str, Any]]:
    """Its parts; a file may also be one part alone."""
    alone = not isinstance(content, Mapping) or is_model(content) or _is_optimizer(content)
    if alone:
        return [("", content)]
    return [(str(key), value) for key, value in content.items() if key != RESERVED]


def _part(key: str, value: Any, source: Source) -> dict[str, Any]:
    if is_model(value):
        tensors = [(name, each) for name, each in value.items() if isinstance(each, Tensor)]
        kind = "model" if hasattr(value, "_metadata") else "tensors"
        return {"key": key, "kind": kind, **_tensors(tensors, source)}
    if _is_optimizer(value):
        states = value["state"]
        tensors = [
            (f"{parameter}.{name}", each)
            for parameter, held in states.items()
            if isinstance(held, Mapping)
            for name, each in held.items()
            if isinstance(each, Tensor)
        ]
        rates = [group["lr"] for group in value["param_groups"] if "lr" in group]
        return {
            "key": key,
            "kind": "optimizer",
            **_tensors(tensors, source),
            "groups": len(value["param_groups"]),
            "lr": [rate.item() if isinstance(rate, Tensor) else rate for rate in rates],
            "state": sorted({name.rpartition(".")[2] for name, _ in tensors}),
        }
    if isinstance(value, LaidOut):
        return {"key": key, "kind": value.kind, "layout": value.layout, "value": str(value)}
    return {"key": key, "kind": "value", "value": _shown(value)}


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
    )


def _tensors(named: list[tuple[str, Tensor]], source: Source) -> dict[str, Any]:
    # A tied weight has several names, and is stored once.
    stored = {source.stored_at(each): each for _, each in named}.values()
    dtypes = Counter(map(_dtype, stored))
    return {
        "count": len(stored),
        "names": len(named),
        "elements": sum(each.numel() for each in stored),
        "bytes": sum(each.numel() * each.element_size() for each in stored),
        "dtypes": dict(sorted(dtypes.items())),
        "tensors": [
            {"name": name, "shape": list(each.shape), "dtype": _dtype(each)} for name, each in named
        ],
    }


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shown(value: Any) -> Any:
    """A plain value itself; of anything larger, what it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        shape = "x".join(map(str, value.shape)) or "scalar"
        return f"tensor of {_dtype(value)}, {shape}"
    if isinstance(value, Mapping):
        return f"dict of {listed(list(map(str, value)))}" if value else "empty dict"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
