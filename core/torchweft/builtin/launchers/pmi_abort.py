"""Telling the process manager of MPICH or Intel MPI that a rank failed."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys

__all__ = ["abort_when_failed"]

#: The socket to the process manager, whose number is in the environment.
_SOCKET = "PMI_FD"
#: A line of PMI's protocol that is understood at any time, whether or not MPI was initialised.
_ABORT = b"cmd=abort exitcode=1\n"


def abort_when_failed() -> None:
    """Have the other ranks ended once this one has failed by an exception.

    That manager minds the exit status of no process that did not initialise MPI, and the others
    would run on.
    """
    atexit.unregister(_abort)
    atexit.register(_abort)


def _abort() -> None:
    if getattr(sys, "last_value", None) is None:
        return
    descriptor = os.environ.get(_SOCKET, "")
    if descriptor.isdigit():
        with contextlib.suppress(OSError):
            os.write(int(descriptor), _ABORT)
