"""The life of a rank's process: what it is told, how many threads it takes, how it ends.

Free of torch until a rank does something that needs it, so that a rank can be a fresh interpreter
whose script imports torch itself.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import json
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from torchweft.errors import TorchweftError
from torchweft.handoff import VARIABLE, Handoff
from torchweft.rank import RankInfo

__all__ = [
    "ERROR_FILE",
    "as_main_process",
    "become_rank",
    "claim",
    "close_stdin",
    "detach_from_parent",
    "die_with_parent",
    "end",
    "exit_status",
    "failed",
    "format_error",
    "own_the_end",
    "record_failure",
    "run_script",
    "share_threads",
    "wind_down",
]

#: The variable by which torch's agent tells a worker where to write its error; used by all of
#: torchweft's launchers.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"

_PACKAGE = str(Path(__file__).parent)

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


# -- the beginning -----------------------------------------------------------------------------


def become_rank(
    info: RankInfo,
    *,
    address: str,
    port: int,
    handoff: Handoff,
    error_file: str = "",
) -> None:
    """Set what a rank's environment says: torch's variables, and torchweft's own hand-off."""
    os.environ.update(info.to_environ())
    os.environ.update(handoff.to_environ())
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    if error_file:
        os.environ[ERROR_FILE] = error_file
    share_threads(info.local_world_size)


def claim(environ: MutableMapping[str, str]) -> None:
    """Take over, in a rank, the hand-off that was written for all children of its supervisor.

    A fork server stands between the two, so that the rank could not tell by its parent.
    """
    fields = json.loads(environ[VARIABLE])
    handoff = Handoff(**{**fields, "pid": os.getpid(), "parent": None})
    environ.update(handoff.to_environ())


def share_threads(ranks: int) -> None:
    """Divide the processor among the ranks of a node, unless the user set OMP_NUM_THREADS."""
    if ranks == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    torch = sys.modules.get("torch")
    available = torch.get_num_threads() if torch is not None else usable_cores()
    threads = max(1, available // ranks)
    # The variable is for libraries and programs that start later; torch in a forked process has
    # read it long ago and is told directly.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch is not None:
        torch.set_num_threads(threads)


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent dies, however that dies (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def detach_from_parent() -> None:
    """Forget, in a forked process, what only its parent may clean up.

    Without this the child would end its parent's DataLoader workers and remove its files.
    """
    multiprocessing.process._children = set()  # type: ignore[attr-defined]
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]


def close_stdin() -> None:
    """Give this rank an empty standard input; the terminal belongs to local rank 0."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115


# -- failure -----------------------------------------------------------------------------------


def record_failure(error: BaseException) -> None:
    """Write torch's error file; the supervisor prints it, this rank stays silent.

    The file is that of ``torch.distributed.elastic.multiprocessing.errors``, with the time in
    nanoseconds and whether the error looks like a lost peer.
    """
    sys.last_value = error
    path = os.environ.get(ERROR_FILE)
    text = format_error(error)
    if not path:
        sys.stderr.write(text)
        return
    message = f"{type(error).__name__}: {error}"
    now = time.time_ns()
    content = {
        "message": {
            "message": message,
            "extraInfo": {
                "py_callstack": text,
                "timestamp": str(now // 10**9),
                "time_ns": now,
                "rank": int(os.environ.get("RANK", "0")),
                "lost_peer": any(words in message for words in _LOST_PEER),
            },
        }
    }
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except OSError:
        # A full disk must not hide the error itself.
        sys.stderr.write(text)


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
    return "".join(told.format())


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith((_PACKAGE, "<frozen")) or "multiprocessing" in frame.filename


def failed() -> bool:
    """Whether an exception ended this process's program, as Python itself records it."""
    return getattr(sys, "last_value", None) is not None


# -- the end -----------------------------------------------------------------------------------


def wind_down() -> None:
    """Join threads, run atexit and flush, as the interpreter does before its teardown.

    An interrupt from the keyboard may arrive twice, from the terminal and from the supervisor;
    what follows is short, and cut off by the supervisor where it is not.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def end(status: int) -> NoReturn:
    """End this rank: join threads, run atexit, flush, and go without tearing anything down.

    The destructors of DistributedDataParallel and of gloo's group deadlock when a namespace is
    torn down, so it is not: the process is gone at once.
    """
    wind_down()
    os._exit(status)


def exit_status(error: BaseException) -> int:
    """The status with which Python ends after ``error``."""
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        if isinstance(error.code, int):
            return error.code & 0xFF
        sys.stderr.write(f"{error.code}\n")
        return 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def own_the_end(leave: Callable[[bool], None], *, owned: bool) -> None:
    """Arrange for the end of a rank whose script runs in an interpreter of its own.

    ``leave(failed)`` is called once the script is done, to leave the process group. ``owned``:
    nobody else prints this process's errors or needs its teardown, so an exception goes to the
    error file and the process ends at once.
    """

    def at_exit() -> None:
        leave(failed())
        _keep_namespaces()

    atexit.register(at_exit)
    if not owned:
        return

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


# -- running a script --------------------------------------------------------------------------


def as_main_process() -> None:
    """Make a process that ``multiprocessing`` started look as if it had been started by hand."""
    multiprocessing.set_start_method(None, force=True)
    current: Any = multiprocessing.current_process()
    current._identity = ()
    current._name = "MainProcess"
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]


def run_script(path: str, arguments: list[str]) -> int:
    """Run a script as ``python path arguments…`` would; returns the status it ends with.

    An exception is recorded for the supervisor. The script's namespace is kept.
    """
    main = ModuleType("__main__")
    main.__dict__.update(__file__=os.path.abspath(path), __builtins__=builtins)
    sys.modules["__main__"] = main
    sys.argv = [path, *arguments]
    sys.orig_argv = [sys.executable, path, *arguments]
    sys.path[0] = str(Path(path).resolve().parent)
    status = 0
    try:
        source = Path(path).read_bytes()
        exec(compile(source, os.path.abspath(path), "exec"), main.__dict__)
    except BaseException as error:
        status = exit_status(error)
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            record_failure(error)
        elif status != 0:
            sys.last_value = error  # the group is left without waiting for the others
    wind_down()
    return status
