"""A folder that appears whole: written beside its place, and put there in one step."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress

from torchweft.checkpoint.file import check_address, existing, stem_of, sync_folder
from torchweft.checkpoint.manifest import MANIFEST, Manifest
from torchweft.errors import CheckpointError, listed

__all__ = ["Aside", "check_target", "put_aside"]


def check_target(path: str | os.PathLike[str]) -> str:
    """Where a folder for ``path`` is to go, symbolic links followed.

    Raises ``CheckpointError`` where something is that may not be replaced.
    """
    check_address(path)
    target = os.path.realpath(path)
    if not os.path.lexists(target):
        return target
    if not os.path.isdir(target):
        raise CheckpointError(
            "it is a file, and a path without a suffix means a folder; remove the file, or write "
            f"one file by a path with a suffix, such as '{os.path.basename(target)}.ckpt'"
        )
    names = os.listdir(target)
    if not names:
        return target
    if MANIFEST not in names:
        raise CheckpointError(
            f"it is a folder that is no checkpoint, and would be replaced with all that it holds "
            f"({_shown(names)}); name a new folder, such as "
            f"'{os.path.join(os.path.basename(target), 'last')}'"
        )
    known = {MANIFEST, *Manifest.names(target)}
    folders = {name.split(os.sep)[0] for name in known if os.sep in name}
    others = [name for name in names if name not in known | folders]
    others += [name for each in folders for name in _below(target, each) if name not in known]
    if others:
        raise CheckpointError(
            f"the checkpoint there would be replaced, and its folder holds more than that "
            f"({_shown(others)}); move that away, or name a new folder"
        )
    return target


def _below(target: str, name: str) -> Iterator[str]:
    """The files in a folder of the target, by their paths in that."""
    for inside, _, files in os.walk(os.path.join(target, name)):
        for file in files:
            yield os.path.relpath(os.path.join(inside, file), target)


def _shown(names: list[str]) -> str:
    return listed([repr(name) for name in sorted(names)], shown=3)


class Aside:
    """A fresh folder beside the target, removed by ``close`` unless it was put in place.

    A lock, which ends with its process, tells other saves to the same name to leave it.
    """

    def __init__(self, target: str) -> None:
        parent, name = os.path.split(target)
        self._target = target
        self._parent = parent
        self._stem = stem_of(name)
        os.makedirs(parent, exist_ok=True)
        self._sweep("tmp")
        unique = f"{self._stem}{os.getpid()}-{os.urandom(4).hex()}"
        self.path = os.path.join(parent, f"{unique}.tmp")
        self._old = os.path.join(parent, f"{unique}.old")
        os.mkdir(self.path)
        self._lock = os.open(self.path, os.O_RDONLY)
        # File systems without locks have nothing swept either.
        with suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def put_in_place(self) -> None:
        """Flush the folder and make it the target, which is the old one or the new at any time."""
        sync_folder(self.path)
        if not os.path.lexists(self._target):
            os.rename(self.path, self._target)
        elif not _exchange(self.path, self._target):
            # In between, the old one is complete under another name, which loading mentions.
            os.rename(self._target, self._old)
            try:
                os.rename(self.path, self._target)
            except OSError:
                os.rename(self._old, self._target)
                raise
        # Some network file systems refuse this, and the folder is whole without it.
        with suppress(OSError):
            sync_folder(self._parent)
        self._sweep("old")

    def close(self) -> None:
        """Remove what is left beside the target, be it the new one or the one before it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if os.path.isdir(self._target):
            shutil.rmtree(self._old, ignore_errors=True)
        os.close(self._lock)

    def _sweep(self, ending: str) -> None:
        """Remove what saves to the same name left behind when they were killed."""
        pattern = _left_by(self._stem, ending)
        for name in os.listdir(self._parent):
            path = os.path.join(self._parent, name)
            if not pattern.fullmatch(name) or not os.path.isdir(path):
                continue
            with suppress(OSError):
                lock = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(lock)


def put_aside(path: str) -> str:
    """The checkpoint that a killed save moved out of the way of ``path``; empty where none is."""
    parent, name = os.path.split(path)
    if os.path.lexists(path) or existing(parent) != parent or not os.path.isdir(parent):
        return ""
    pattern = _left_by(stem_of(name), "old")
    found = [os.path.join(parent, each) for each in os.listdir(parent) if pattern.fullmatch(each)]
    return max(found, default="")


def _left_by(stem: str, ending: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(stem)}\d+-[0-9a-f]{{8}}\.{ending}")


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _exchange(one: str, other: str) -> bool:
    """Exchange two folders in one step; False where the system or its file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), other)
