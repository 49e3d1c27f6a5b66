"""The end of a rank: in the interpreter's own order, but without tearing anything down."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import NoReturn

from torchweft.process.begin import ERROR_FILE
from torchweft.process.failure import record_failure
from torchweft.process.files import close_files, write_error
from torchweft.process.signals import in_main_thread

__all__ = ["end", "exit_status", "own_the_end", "stay_until_the_end", "wind_down"]

#: Seconds that a rank which failed waits for its other threads. They may wait for ever, and the
#: other ranks with them.
_PATIENCE = 2.0
#: Seconds between two looks at them.
_TICK = 0.02


def wind_down(status: int = 0) -> None:
    """Join threads, run atexit and write out files, as the interpreter does before its teardown.

    An interrupt from the keyboard may arrive twice, from the terminal and from the supervisor;
    what follows is short, and cut off by the supervisor where it is not.
    """
    if in_main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if status == 0:
        threading._shutdown()  # type: ignore[attr-defined]
    else:
        waiting = threading.Thread(
            target=threading._shutdown,  # type: ignore[attr-defined]
            daemon=True,
        )
        waiting.start()
        deadline = time.monotonic() + _PATIENCE
        # It waits for this thread too, which is the main one.
        while _others() and time.monotonic() < deadline:
            waiting.join(_TICK)
    atexit._run_exitfuncs()
    close_files()


def _others() -> list[threading.Thread]:
    """Threads for which Python waits at its end, but for this one."""
    here = threading.current_thread()
    return [each for each in threading.enumerate() if each is not here and not each.daemon]


def end(status: int) -> NoReturn:
    """End this rank: join threads, run atexit, flush, and go without tearing anything down.

    The destructors of DistributedDataParallel and of gloo's group deadlock when a namespace is
    torn down, so it is not: the process is gone at once.
    """
    try:
        wind_down(status)
    finally:
        os._exit(status)


def exit_status(error: BaseException) -> int:
    """The status with which Python ends after ``error``."""
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        if isinstance(error.code, int):
            return error.code & 0xFF
        write_error(f"{error.code}\n")
        return 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def own_the_end() -> None:
    """Arrange for the end of a rank whose script runs in an interpreter of its own.

    Nobody else prints this process's errors or needs its teardown, so an exception goes to the
    error file, and the process ends without running a destructor.
    """

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            sys.last_value = error
        else:
            record_failure(error.with_traceback(trace))
        end(exit_status(error))

    sys.excepthook = excepthook
    _skip_teardown_of_libraries()


def stay_until_the_end(leave: Callable[[bool], None], *, keep: bool) -> None:
    """Have ``leave(failed)`` called once the script is done, to leave the process group.

    ``keep``: no destructor runs afterwards, in whosever interpreter this is, and Python does not
    search for garbage at its end, which takes a second after torch was imported.
    """
    # An interactive session shows errors and goes on; those before now are none of ours.
    before = getattr(sys, "last_value", None)

    def at_exit() -> None:
        error = getattr(sys, "last_value", None)
        try:
            leave(error is not None and error is not before)
        except BaseException as failure:
            # Python would print it and end with status 0; for a rank it is a failure.
            if ERROR_FILE not in os.environ:
                raise
            record_failure(failure)
            close_files()
            os._exit(1)
        if keep:
            close_files()
            _keep_namespaces()
            gc.freeze()

    atexit.register(at_exit)


def _keep_namespaces() -> None:
    """Hold every module's objects for ever, so that finalisation runs no destructor of theirs."""
    kept = [dict(vars(m)) for m in list(sys.modules.values()) if isinstance(m, ModuleType)]
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _skip_teardown_of_libraries() -> None:
    """After Python's own finalisation, leave with the same status and run no C++ destructor.

    The status of ``sys.exit(3)`` is known to nobody in Python at that point; C's ``on_exit``
    passes it on to ``_exit``. Buffers of C libraries are flushed before.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit") and hasattr(libc, "__cxa_atexit"):
        libc.on_exit(libc._exit, None)
        # Called before _exit, being registered after it: fflush(NULL) writes every C stream.
        libc.__cxa_atexit(libc.fflush, None, None)
