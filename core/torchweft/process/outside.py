"""The failure of a rank in an interpreter that is not ours, whose job somebody outside ends."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from types import TracebackType

from torchweft.process.end import end, exit_status
from torchweft.process.failure import lost_peer, message_of
from torchweft.process.files import write_error

__all__ = ["end_with_the_others"]

#: Seconds in which whoever made the ranks ends those that lost one.
_PATIENCE = 3.0
#: Characters of torch's own message, which has advice behind what happened.
_WIDTH = 150


class _Hook:
    """What happens to an exception that nobody catches."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._before = sys.excepthook
        self._who = f"rank {rank} of {world_size}"

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        lost = lost_peer(error)
        if lost:
            time.sleep(_PATIENCE)
        if lost and os.environ.get("TORCHWEFT_TRACE") != "1":
            message = textwrap.shorten(message_of(error), _WIDTH, placeholder=" …")
            write_error(
                f"torchweft: {self._who} ends because it lost another rank, which says why it "
                f"failed, or left out a collective operation ({message}); TORCHWEFT_TRACE=1 shows "
                "where\n"
            )
        else:
            self._before(kind, error, trace)
        if isinstance(error, Exception):
            end(exit_status(error))


def end_with_the_others(rank: int, world_size: int) -> None:
    """Have a failure told once, by the rank that is its cause, and end the job soon.

    The rank that fails shows its traceback as Python does, and waits for no thread that never
    ends. Whoever made the ranks ends the others then; one that only lost its peer waits for that
    in silence, and says so in a line where nobody comes. To be called once the process group
    exists: torch holds back what is written by hooks that were set before.
    """
    interactive = hasattr(sys, "ps1") or sys.flags.interactive
    if not interactive and not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(rank, world_size)
