"""The failure of a rank in an interpreter that is not ours, whose job somebody outside ends."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from torchweft.process.end import end, exit_status
from torchweft.process.failure import lost_peer
from torchweft.process.files import write_error

__all__ = ["end_with_the_others"]

#: Seconds in which whoever made the ranks ends those that lost one.
_PATIENCE = 3.0


class _Hook:
    """What happens to an exception that nobody catches."""

    def __init__(self) -> None:
        self._before = sys.excepthook

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if lost_peer(error):
            time.sleep(_PATIENCE)
            write_error(
                "torchweft: this looks like the loss of another rank, of which no failure is "
                "known; every rank has to take part in every collective operation\n"
            )
        self._before(kind, error, trace)
        if isinstance(error, Exception):
            end(exit_status(error))


def end_with_the_others() -> None:
    """Have a failure told once, by the rank that is its cause, and end the job soon.

    The rank that fails shows its traceback as Python does, and waits for no thread that never
    ends. Whoever made the ranks ends the others then; one that only lost its peer waits for that
    in silence, and speaks where nobody comes. To be called once the process group exists: torch
    holds back what is written by hooks that were set before.
    """
    interactive = hasattr(sys, "ps1") or sys.flags.interactive
    if not interactive and not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook()
