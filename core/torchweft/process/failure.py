"""How a rank tells how it came to its end: that it is done, or torch's error file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from torchweft.errors import TorchweftError
from torchweft.handoff import Handoff
from torchweft.process.begin import ERROR_FILE
from torchweft.process.files import write_error
from torchweft.process.output import add_failure

__all__ = [
    "done_file",
    "format_error",
    "joined_file",
    "minding_file",
    "lost_peer",
    "message_of",
    "record_done",
    "record_failure",
    "record_joined",
    "record_minding",
    "record_stopping",
    "stopping_file",
]

_PACKAGE = str(Path(__file__).parents[1]) + os.sep

#: What an exception says when its rank only lost a peer, and is not the cause.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "recvValue failed",
    "sendBytes failed",
    "NCCL communicator was aborted",
    "remote process exited",
)


def joined_file(error_file: Path) -> Path:
    """What appears beside a rank's error file once it has joined the run."""
    return error_file.with_name(f"{error_file.name}.joined")


def done_file(error_file: Path) -> Path:
    """What appears beside a rank's error file once the rank takes part in nothing any more."""
    return error_file.with_name(f"{error_file.name}.done")


def minding_file(error_file: Path) -> Path:
    """What appears beside a rank's error file once it leaves by itself when it is told to end."""
    return error_file.with_name(f"{error_file.name}.minding")


def stopping_file(error_file: Path) -> Path:
    """What appears beside a rank's error file once it learns that all ranks are to leave."""
    return error_file.with_name(f"{error_file.name}.stopping")


def record_minding() -> None:
    """Tell the supervisor that this process minds being told to end, and leaves by itself."""
    _touch(minding_file)


def record_stopping() -> None:
    """Tell the supervisor that this process leaves because a rank of the run was told to end."""
    _touch(stopping_file)


def record_joined() -> None:
    """Tell the supervisor that this process takes part in the run."""
    _touch(joined_file)


def record_done() -> None:
    """Tell the supervisor, before others lose this rank, that it leaves them because it is done."""
    _touch(done_file)


def _touch(beside: Callable[[Path], Path]) -> None:
    path = os.environ.get(ERROR_FILE)
    if path:
        with contextlib.suppress(OSError):  # it only serves to explain
            beside(Path(path)).write_text(os.environ.get("RANK", "0"))


def record_failure(error: BaseException) -> None:
    """Write torch's error file; the supervisor prints it, this rank stays silent.

    The file is that of ``torch.distributed.elastic.multiprocessing.errors``, with the time in
    nanoseconds and whether the error looks like a lost peer. It appears whole or not at all.
    """
    sys.last_value = error
    path = os.environ.get(ERROR_FILE)
    text = format_error(error)
    if not path:
        write_error(text)
        return
    message = message_of(error)
    now = time.time_ns()
    content = {
        "message": {
            "message": message,
            "extraInfo": {
                "py_callstack": text,
                "timestamp": str(now // 10**9),
                "time_ns": now,
                "rank": int(os.environ.get("RANK", "0")),
                "world_size": int(os.environ.get("WORLD_SIZE", "1")),
                "lost_peer": lost_peer(error),
            },
        }
    }
    try:
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(f"{path}.part", path)
    except OSError:
        # A full disk must not hide the error itself.
        write_error(text)
        return
    handoff = Handoff.read(os.environ)
    if handoff is not None and handoff.log_dir:
        add_failure(handoff.log_dir, text)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    # A refused connection of the script's own is an OSError; torch's are RuntimeErrors.
    return isinstance(error, RuntimeError) and any(w in message_of(error) for w in _LOST_PEER)


def format_error(error: BaseException) -> str:
    """The traceback as Python prints it, without the frames that led into user code.

    Of an error that torchweft raises on purpose, the frames inside torchweft tell nothing more
    than the message, and are left out too.
    """
    told = traceback.TracebackException.from_exception(error)
    ours = [_is_ours(frame) for frame in told.stack]
    if False in ours:
        start = ours.index(False)
        stop = len(ours)
        if isinstance(error, TorchweftError):
            stop -= ours[::-1].index(False)
        told.stack[:] = told.stack[start:stop]
    elif isinstance(error, SyntaxError):
        told.stack.clear()  # the script was never entered; the message says where
    return "".join(told.format())


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith((_PACKAGE, "<frozen"))


def message_of(error: BaseException) -> str:
    """``"ValueError: …"``; also of an exception that cannot say what it is."""
    try:
        text = str(error)
    except Exception as failure:
        text = f"<its message cannot be made: {type(failure).__name__}>"
    # As Python has it: "MemoryError" alone.
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
