"""The description that torch.distributed.checkpoint keeps of a folder, read without running code.

It is a pickle, and torch unpickles whatever it names.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import pickle
from collections import OrderedDict
from typing import Any

import torch

from torchweft.checkpoint.file import first_line
from torchweft.errors import CheckpointError

__all__ = ["METADATA", "read_metadata"]

#: Name of the file.
METADATA = ".metadata"

_DCP = "torch.distributed.checkpoint"

# All that torch writes there, from 2.3 to 2.13. None of it does more when it is made than to keep
# its arguments.
_CLASSES = {
    f"{_DCP}.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}.filesystem": ("_StorageInfo",),
    # Where it stood before torch 2.3.
    "torch.distributed._shard.sharded_tensor.metadata": ("MEM_FORMAT_ENCODING", "TensorProperties"),
    "torch.serialization": ("_get_layout",),
}

# The folder's own path, which nobody asks for; the writer's kind of path may not exist here.
_PATHS = {
    "Path": pathlib.PurePath,
    "PosixPath": pathlib.PurePosixPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
    "WindowsPath": pathlib.PureWindowsPath,
}


def read_metadata(folder: str) -> Any:
    """The ``Metadata`` of a folder.

    Raises ``CheckpointError`` for what is damaged, and for anything in it that is not a
    description of tensors in this folder.
    """
    path = os.path.join(folder, METADATA)
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
    except (CheckpointError, MemoryError):
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
    except Exception as error:
        raise CheckpointError(f"'{path}' is damaged: {first_line(error)}") from error
    _check(path, metadata)
    return metadata


class _Unpickler(pickle.Unpickler):
    """Makes the classes above and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return _PATHS[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch":
            found = torch.Size if name == "Size" else vars(torch).get(name)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
        if name in _CLASSES.get(module, ()):
            found = vars(importlib.import_module(module)).get(name)
            if found is not None:
                return found
            raise CheckpointError(
                f"the checkpoint's '{METADATA}' names {module}.{name}, which torch "
                f"{torch.__version__} does not have"
            )
        raise CheckpointError(
            f"the checkpoint's '{METADATA}' names {module}.{name}, which is no part of the "
            "description of tensors; loading it may run code, and it was not loaded"
        )


def _check(path: str, metadata: Any) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    stored = getattr(metadata, "storage_data", None)
    if not isinstance(metadata, Metadata) or not isinstance(stored, dict):
        raise CheckpointError(
            f"'{path}' is not what torch.distributed.checkpoint writes: it holds a "
            f"{type(metadata).__name__}"
        )
    for info in stored.values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(
                f"'{path}' points at {name!r}, which is not a file of the checkpoint's folder"
            )
