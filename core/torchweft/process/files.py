"""Writing out what is still in memory before a process ends without any teardown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import logging
import sys
from typing import Any

__all__ = ["close_files", "flush_files", "flush_streams", "write_error"]

_TEXT = (io.TextIOWrapper,)
_BINARY = (io.BufferedWriter, io.BufferedRandom)


def flush_streams() -> None:
    """Flush standard output and error; either may be closed or missing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def write_error(text: str) -> None:
    """Write to standard error at once; nobody is helped by a second error where it is closed."""
    with contextlib.suppress(Exception):
        sys.stderr.write(text)
        sys.stderr.flush()


def flush_files() -> None:
    """Flush every open file of this process, so that a fork does not write its contents twice."""
    for reference in list(logging._handlerList):  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):
            reference().flush()
    flush_streams()
    found = [file for file in gc.get_objects() if type(file) in (*_TEXT, *_BINARY)]
    _flush(found)


def close_files() -> None:
    """Do for every open file what its destructor would do: write out what it still holds.

    Compressed files and the like write an end, and temporary ones are removed.
    """
    flush_streams()
    # By type: a proxy object would answer isinstance() by loading what it stands for.
    kinds = (io.IOBase, getattr(sys.modules.get("tempfile"), "_TemporaryFileWrapper", io.IOBase))
    found = [file for file in gc.get_objects() if issubclass(type(file), kinds)]
    _flush([file for file in found if type(file) in _TEXT])
    # A notebook's standard streams write something of their own where they are closed.
    standard = {id(stream) for stream in (sys.stdin, sys.stdout, sys.stderr)}
    for file in found:
        if type(file).__module__ not in ("io", "_io") and id(file) not in standard:
            with contextlib.suppress(Exception):
                file.close()
    _flush(found)


def _flush(files: list[Any]) -> None:
    # A layer of text hands on what it holds to the binary layer below it.
    for file in sorted(files, key=lambda file: type(file) not in _TEXT):
        with contextlib.suppress(Exception):  # closed, detached, a full disk
            if not file.closed:
                file.flush()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)  # and every stream of C libraries
