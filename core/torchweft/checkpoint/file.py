"""One checkpoint file: written whole or not at all, read without running code from it."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import mmap
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import torch

from torchweft.checkpoint.manifest import MANIFEST
from torchweft.checkpoint.plain import check_loadable, without_numpy_scalars
from torchweft.errors import CheckpointError, listed

__all__ = [
    "beside",
    "check_address",
    "existing",
    "first_line",
    "identity",
    "read",
    "reason",
    "stem_of",
    "sync_folder",
    "write",
]


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
        _check_target(path, target)
        content = without_numpy_scalars(content)
        check_loadable(content)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with beside(target) as file:
            torch.save(content, file)
            file.flush()
            _check_written(file.name, content)
            os.fsync(file.fileno())
            os.replace(file.name, target)
    except CheckpointError as error:
        raise CheckpointError(f"cannot save to '{shown}': {error}") from error.__cause__
    except Exception as error:
        kept = "; the file that was there is as it was" if os.path.isfile(target) else ""
        raise CheckpointError(f"cannot save to '{shown}': {reason(error)}{kept}") from error
    # Some network file systems refuse this, and the file is whole without it.
    with suppress(OSError):
        sync_folder(os.path.dirname(target))


def _check_target(path: str | os.PathLike[str], target: str) -> None:
    """Refuse what is not a path, and what a rename must not replace."""
    check_address(path)
    if target.endswith(".safetensors"):
        raise CheckpointError(
            "torch.load reads files of that suffix as another format; use '.ckpt' or '.pt'"
        )
    try:
        mode = os.stat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISDIR(mode):
        raise CheckpointError("it is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise CheckpointError("it is a device, a pipe or a socket, not a file")


def check_address(path: str | os.PathLike[str]) -> None:
    """Refuse what is the address of something that is not in a file system."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", os.fspath(path))
    if scheme and not os.path.exists(f"{scheme[1]}:"):
        raise CheckpointError(
            f"'{scheme[1]}:' begins an address; only paths of this machine's file systems are "
            "written"
        )


@contextmanager
def beside(target: str) -> Iterator[BinaryIO]:
    """An open file in the target's folder that is gone afterwards, unless it was renamed."""
    folder, name = os.path.split(target)
    stem = stem_of(name)
    _sweep(folder, stem)
    file = _create(folder, stem)
    try:
        yield file
    finally:
        with suppress(OSError):
            os.unlink(file.name)
        # After a failed write, closing tries to write again.
        with suppress(OSError):
            file.close()


def stem_of(name: str) -> str:
    """How the names of what is written aside for ``name`` begin, which no other name's do."""
    if len(name) > 40:
        # The longest allowed name leaves no room for an ending.
        name = f"{name[:31]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    return f".{name}."


def _create(folder: str, stem: str) -> BinaryIO:
    """A new file, locked for as long as it is open, which tells ``_sweep`` to leave it."""
    while True:
        name = f"{stem}{os.getpid()}-{os.urandom(4).hex()}.tmp"
        file = open(os.path.join(folder, name), "xb")  # noqa: SIM115 - the caller closes it
        # File systems without locks have nothing swept either.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # swept between opening and locking


def _sweep(folder: str, stem: str) -> None:
    """Remove what saves to the same name left behind when they were killed.

    A lock ends with its process, so only files that nobody is writing can be locked here.
    """
    pattern = re.compile(re.escape(stem) + r"\d+-[0-9a-f]{8}\.tmp")
    for name in os.listdir(folder):
        if not pattern.fullmatch(name):
            continue
        with suppress(OSError), open(os.path.join(folder, name), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(file.name)


def _check_written(name: str, content: Any) -> None:
    # Mapped, so that the tensors, which are nearly all of it, are not read again.
    try:
        torch.load(name, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:
        check_loadable(content, thorough=True)
        raise


def sync_folder(folder: str) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """What the operating system said, where it did: torch's writer raises its own error last."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, FileExistsError | NotADirectoryError):
            return f"'{existing(found.filename)}' is not a folder"
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    return first_line(error)


def existing(path: str) -> str:
    """The path, or the nearest folder above it that there is."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def first_line(error: BaseException) -> str:
    """An error's class, and what it says happened."""
    # torch puts general advice before what happened.
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# -- reading -------------------------------------------------------------------------------------


def read(
    path: str | os.PathLike[str],
    *,
    weights_only: bool = True,
    map_location: Any = "cpu",
    mapped: bool = False,
) -> Any:
    """What ``torch.save`` wrote to ``path``, tensors at ``map_location``.

    Files of torch before 1.6 are read too. ``mapped``: tensors are read from the disk once they
    are used, where the form of the file and its file system allow it. ``weights_only=False`` runs
    code that the file names.

    Raises:
        CheckpointError: when there is no such file, when it is truncated or no checkpoint, or
            when it holds classes that are not known to be safe.
    """
    shown = os.path.abspath(path)
    head = _head(shown)
    try:
        if mapped and zipfile.is_zipfile(shown):
            # Some file systems map nothing.
            with suppress(RuntimeError):
                return _map(shown, map_location, weights_only)
        return torch.load(shown, map_location=map_location, weights_only=weights_only)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(_explain(shown, head, error, weights_only)) from error


def _map(path: str, map_location: Any, weights_only: bool) -> Any:
    before = identity(path)
    content = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)
    # It is opened by its name for what it says and again for its tensors.
    if identity(path) != before:
        raise CheckpointError(f"'{path}' was replaced while it was read; load it again")
    return content


def identity(path: str) -> tuple[int, ...] | None:
    """What tells a file, which is never changed, from another of that name; None for no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    # The number alone may be that of a file that is gone.
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _head(path: str) -> bytes:
    """The first bytes of a file that can be opened."""
    try:
        with open(path, "rb") as file:
            return file.read(4)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"there is no checkpoint '{path}'; {_nearby(path)}") from error
    except IsADirectoryError as error:
        raise CheckpointError(
            f"'{path}' is a folder, not a checkpoint; {_listing(path, '')}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error


def _nearby(path: str) -> str:
    folder, name = os.path.split(path)
    above = existing(folder)
    if not os.path.isdir(above):
        return f"'{above}' is not a folder"
    if above != folder:
        missing = folder.removeprefix(above).strip(os.sep).split(os.sep)[0]
        return f"the folder '{os.path.join(above, missing)}' does not exist"
    return _listing(folder, name)


def _listing(folder: str, wanted: str) -> str:
    """The files and checkpoints of a folder, those of the nearest name first."""
    try:
        entries = os.scandir(folder)
    except OSError as error:
        return f"'{folder}' cannot be listed: {error.strerror}"
    with entries:
        names = sorted(
            each.name
            for each in entries
            if not each.name.startswith(".")
            and (each.is_file() or os.path.exists(os.path.join(each.path, MANIFEST)))
        )
    near = difflib.get_close_matches(wanted, names, n=8, cutoff=0.6)
    if not names:
        return f"'{folder}' holds no files"
    ordered = [*near, *(name for name in names if name not in near)]
    return f"'{folder}' holds {listed([repr(name) for name in ordered])}"


def _explain(path: str, head: bytes, error: Exception, weights_only: bool) -> str:
    if not head:
        return f"'{path}' is empty, not a checkpoint"
    # The directory of a zip archive is at its end.
    archive = head == b"PK\x03\x04"
    if archive and not zipfile.is_zipfile(path):
        return f"'{path}' is truncated: {os.path.getsize(path)} bytes and no end of the archive"
    refused = isinstance(error, pickle.UnpicklingError) and weights_only
    unsafe = _unsafe_classes(path, archive, error) if refused else ""
    if unsafe:
        return (
            f"'{path}' holds objects that are not safe to load: {unsafe}; loading them may run "
            "code. Only if you trust whoever wrote the file, pass weights_only=False, or allow "
            "these alone with torch.serialization.add_safe_globals()"
        )
    if isinstance(error, ImportError | AttributeError) and not weights_only:
        return f"'{path}' holds objects of a class that is not here: {first_line(error)}"
    return (
        f"'{path}' cannot be read as a checkpoint: {first_line(error)}; it may be damaged, or "
        "written by something other than torch.save"
    )


_UNSAFE = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)")


def _unsafe_classes(path: str, archive: bool, error: Exception) -> str:
    first = _UNSAFE.search(str(error))
    if first is None:
        return ""
    if archive:
        # torch's error names the first only.
        with suppress(Exception):
            return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    elif not _holds_line(path, first[1].rpartition(".")[2]):
        return ""  # the file ends within the name
    return first[1]


def _holds_line(path: str, text: str) -> bool:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        return data.find(text.encode() + b"\n") >= 0 if text else False
