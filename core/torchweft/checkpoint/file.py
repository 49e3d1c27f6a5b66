"""One checkpoint file: written whole or not at all, read without running code from it."""

from __future__ import annotations

import difflib
import fcntl
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import torch

from torchweft.checkpoint.plain import check_loadable, without_numpy_scalars
from torchweft.errors import CheckpointError

__all__ = ["read", "write"]

_SHOWN = 8


# -- writing -------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` so that ``torch.load(path, weights_only=True)`` reads it.

    A reader, a crash or a full disk never meets half a file: it is written aside in the same
    folder, flushed to the disk and renamed. Folders that do not exist are made. A symbolic link
    is followed. NumPy scalars become Python numbers.

    Raises:
        CheckpointError: when the file could not be written, the file that was there being as it
            was; or when ``content`` holds a value that could not be read back, naming its place.
    """
    shown = os.path.abspath(path)
    target = os.path.realpath(path)
    try:
        existed = _check_target(path, target)
        content = without_numpy_scalars(content)
        check_loadable(content)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _replace(target, content)
    except CheckpointError as error:
        raise CheckpointError(f"cannot save to '{shown}': {error}") from error.__cause__
    except Exception as error:
        kept = "; the file that was there is as it was" if _exists(target) else ""
        raise CheckpointError(f"cannot save to '{shown}': {_reason(error)}{kept}") from error
    if not existed:
        # Not needed for the file to be whole, and refused by some network file systems.
        with suppress(OSError):
            _sync_folder(os.path.dirname(target))


def _check_target(path: str | os.PathLike[str], target: str) -> bool:
    """Whether a file is there already; refuses what a rename must not replace."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", os.fspath(path))
    if scheme and not os.path.exists(f"{scheme[1]}:"):
        raise CheckpointError(
            f"'{scheme[1]}:' is an address, and only paths of mounted file systems can be written"
        )
    if target.endswith(".safetensors"):
        raise CheckpointError(
            "torch.load takes a file of that suffix for another format; use '.ckpt' or '.pt'"
        )
    try:
        mode = os.stat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.S_ISDIR(mode):
        raise CheckpointError("it is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise CheckpointError("it is a device, pipe or socket, not a file")
    return True


def _exists(target: str) -> bool:
    with suppress(OSError):
        return os.path.exists(target)
    return False


def _replace(target: str, content: Any) -> None:
    with _beside(target) as file:
        torch.save(content, file)
        file.flush()
        _check_written(file.name, content)
        os.fsync(file.fileno())
        os.replace(file.name, target)
