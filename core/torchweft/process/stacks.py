"""Where a rank is when it is told to end, or when it crashes: its stacks, written by a signal.

``faulthandler`` writes them from the signal's own handler, so that a rank tells where it waits
while it waits inside of a library.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torchweft.process.begin import ERROR_FILE

__all__ = [
    "Stacks",
    "forget_crash_handler",
    "mind_end",
    "read_stacks",
    "stacks_file",
    "tell_stacks",
]

_FRAME = re.compile(r'^\s*File "(.*)", line (\d+) in (.*)$', re.MULTILINE)

#: Where nothing of the user's is.
_LIBRARIES = (
    str(Path(__file__).parents[1]) + os.sep,
    *{sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    "<",
)


def stacks_file(error_file: Path) -> Path:
    """What a rank writes its stacks to, beside its error file."""
    return error_file.with_name(f"{error_file.name}.stacks")


def tell_stacks() -> None:
    """From here on, write this rank's stacks where it is told to end, or where it crashes.

    A handler of the user's for either takes its place. Does nothing in a process whose supervisor
    wants no error file.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    before = read_stacks(Path(path))
    if before is not None and before.pid == os.getpid():  # an earlier Fabric of this process did
        return
    with contextlib.suppress(OSError, ValueError):  # it only serves to explain
        file = _opened(Path(path), os.O_TRUNC)
        head = {
            "rank": int(os.environ.get("RANK", "0")),
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        os.write(file, (json.dumps(head) + "\n").encode())
        crashes = not faulthandler.is_enabled()
        if crashes:
            faulthandler.enable(file=file)
        faulthandler.register(signal.SIGTERM, file=file, chain=True)

        def in_child() -> None:
            faulthandler.unregister(signal.SIGTERM)
            if crashes:
                faulthandler.disable()

        # A DataLoader's worker that is ended is no news of the rank.
        os.register_at_fork(after_in_child=in_child)


def forget_crash_handler() -> None:
    """Undo what torch's agent sets up in its processes, unless the user wants it too.

    It would write the stacks of a crash to the terminal; ``tell_stacks`` keeps them for the report.
    """
    asked = sys.flags.dev_mode or "faulthandler" in sys._xoptions
    if not asked and not os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.disable()


def _opened(error_file: Path, how: int) -> int:
    """A file descriptor for as long as the process lives; ``faulthandler`` writes to such."""
    return os.open(stacks_file(error_file), os.O_WRONLY | os.O_CREAT | how, 0o666)


def mind_end(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call ``handler`` for ``SIGTERM`` in place of ending, behind what ``tell_stacks`` arranged."""
    # It says whether there was one, which its types do not know.
    told: Any = faulthandler.unregister(signal.SIGTERM)  # type: ignore[func-returns-value]
    signal.signal(signal.SIGTERM, handler)
    path = os.environ.get(ERROR_FILE)
    if told and path:
        with contextlib.suppress(OSError):
            file = _opened(Path(path), os.O_APPEND)
            faulthandler.register(signal.SIGTERM, file=file, chain=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacks:
    """What ``tell_stacks`` left of a rank.

    Attributes:
        rank: global rank.
        host: name of its computer.
        pid: its process id there.
        text: of every thread, innermost call first; empty where it was not told to end.
        world_size: ranks in all.
    """

    rank: int
    host: str
    pid: int
    text: str
    world_size: int = 1

    def doing(self) -> str:
        """``"train.py:14 in step, in all_reduce"``; empty where nothing is known."""
        frames = _main_thread(self.text)
        if not frames:
            return ""
        inner = frames[0]
        own = next((frame for frame in frames if not frame[0].startswith(_LIBRARIES)), inner)
        place = f"{Path(own[0]).name}:{own[1]} in {own[2]}"
        return place if own == inner else f"{place}, in {_called(frames, own)}"


def read_stacks(error_file: Path) -> Stacks | None:
    """What the rank with that error file left; None where it never came to be a rank."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        head, _, text = stacks_file(error_file).read_text("utf-8", "replace").partition("\n")
        fields = json.loads(head)
        return Stacks(
            rank=int(fields["rank"]),
            world_size=int(fields["world_size"]),
            host=str(fields["host"]),
            pid=int(fields["pid"]),
            text=text.partition("\nExtension modules:")[0].strip(),
        )
    return None


def _main_thread(text: str) -> list[tuple[str, str, str]]:
    """Its frames. Threads are listed the newest first, and it is the oldest."""
    threads = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.MULTILINE)
    return [match.groups() for match in _FRAME.finditer(threads[-1])]  # type: ignore[misc]


def _called(frames: list[tuple[str, str, str]], own: tuple[str, str, str]) -> str:
    """What the user's code called, past the wrappers between: the last name that is not private."""
    names = [name for _, _, name in frames[: frames.index(own)]]
    public = [name for name in names if not name.startswith(("_", "<", "wrapper"))]
    return public[0] if public else names[-1]
