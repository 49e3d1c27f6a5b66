"""The beginning of a rank: what its environment says, its parent, its standard input."""

from __future__ import annotations

import atexit
import ctypes
import json
import logging
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import MutableMapping
from typing import Any

from torchweft.handoff import VARIABLE, Handoff
from torchweft.rank import RankInfo

__all__ = [
    "ERROR_FILE",
    "FIRST_FOLDER",
    "as_main_process",
    "become_rank",
    "claim",
    "close_stdin",
    "detach_from_parent",
    "die_with_parent",
    "forget_exit_handlers",
    "interpreter_flags",
    "open_stdin",
    "share_threads",
    "usable_cores",
    "use_threads",
]

#: The variable by which torch's agent tells a worker where to write its error; used by all of
#: torchweft's launchers.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


#: The current folder when torchweft was imported, which is before most scripts go elsewhere.
FIRST_FOLDER = _folder()


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

    A fork server or a guard stands between the two, so that the rank could not tell by its parent.
    """
    fields = json.loads(environ[VARIABLE])
    handoff = Handoff(**{**fields, "pid": os.getpid(), "parent": None})
    environ.update(handoff.to_environ())


def interpreter_flags() -> list[str]:
    """The options that this interpreter was started with, for another one."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags


def share_threads(ranks: int) -> None:
    """Divide the processor among the ranks of a node, unless the user set OMP_NUM_THREADS."""
    if ranks == 1:
        return
    torch = sys.modules.get("torch")
    available = torch.get_num_threads() if torch is not None else usable_cores()
    use_threads(max(1, available // ranks))


def use_threads(threads: int) -> None:
    """Compute with that many threads, unless the user set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    torch = sys.modules.get("torch")
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
    """End this process when its parent dies, however that dies.

    The kernel does it on Linux; elsewhere a thread looks every second.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
    else:
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def detach_from_parent() -> None:
    """Forget, in a forked process, what only its parent may clean up or be woken by.

    Without this the child would end its parent's DataLoader workers and remove its files.
    """
    multiprocessing.process._children = set()  # type: ignore[attr-defined]
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    server: Any = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    if server is not None:  # the parent's child: here nobody can wait for it
        server._forkserver_pid = server._forkserver_address = None
    signal.set_wakeup_fd(-1)  # an event loop's, which would take our signals for its own


def forget_exit_handlers() -> None:
    """Forget what the parent would do at its end; what is registered from here on is our own."""
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    atexit.register(logging.shutdown)
    # Ends this process's own DataLoader workers.
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]


def close_stdin() -> None:
    """Give this rank an empty standard input; the terminal belongs to local rank 0."""
    null = os.open(os.devnull, os.O_RDONLY)
    if null != 0:
        os.dup2(null, 0)
        os.close(null)
    open_stdin()


def open_stdin() -> None:
    """Make ``sys.stdin`` read from descriptor 0, which is another than Python found there."""
    usual: Any = sys.__stdin__ or sys.__stderr__
    try:
        sys.stdin = open(0, encoding=getattr(usual, "encoding", None), closefd=False)  # noqa: SIM115
    except OSError:  # it is closed, as Python says by None
        sys.stdin = None


def as_main_process(start_method: str | None = None) -> None:
    """Make a process that ``multiprocessing`` started look as if it had been started by hand.

    ``start_method``: what the user chose for ``multiprocessing``; None: nothing was chosen yet.
    """
    multiprocessing.set_start_method(start_method, force=True)
    current: Any = multiprocessing.current_process()
    current._identity = ()
    current._name = "MainProcess"
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
