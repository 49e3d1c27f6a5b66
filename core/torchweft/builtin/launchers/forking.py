"""When a fork is safe, and forking a rank."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

from torchweft import process
from torchweft.builtin.launchers.node import Node
from torchweft.builtin.launchers.supervisor import Supervisor
from torchweft.errors import Misuse, TorchweftError

__all__ = [
    "ForkedProcess",
    "debugger",
    "fork_hazards",
    "fork_ranks",
    "no_rerun",
    "preload",
    "refuse_import",
    "under_pytest",
]

#: Threads of ZeroMQ, which a notebook's kernel always has and a rank never uses.
_HARMLESS_THREADS = ("ZMQbg",)


def fork_hazards(accelerator: Callable[[], str | None], *, threads: bool = True) -> list[str]:
    """Why forking this process now could break its children; empty when it is safe.

    ``threads``: whether other Python threads count. A fork carries only the calling thread, and
    what the others held stays locked; a notebook's kernel always has some.
    """
    if sys.platform != "linux":
        return [f"forking is not safe on {sys.platform}"]
    found = []
    others = [t.name for t in threading.enumerate() if t is not threading.current_thread()]
    if threads and others:
        found.append(f"this process has other threads ({', '.join(others[:3])})")
    native = _native_threads()
    if native:
        found.append(
            f"this process has {native} thread(s) of a library, such as the OpenMP pool that an "
            "operation on a large tensor starts"
        )
    hazard = accelerator()
    if hazard:
        found.append(hazard)
    return found


def _native_threads() -> int:
    """Threads that are not Python's and survive a fork's preparation.

    A throwaway fork stops the idle pool that OpenBLAS starts when it is imported; an OpenMP pool
    that was used stays, and its children would hang in their first parallel operation.
    """
    with warnings.catch_warnings():
        # Python warns that other threads may deadlock the child; this child does nothing at all.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    with contextlib.suppress(ChildProcessError):  # somebody else's wait() took it
        os.waitpid(pid, 0)
    known = {thread.native_id for thread in threading.enumerate()}
    count = 0
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) in known:
            continue
        with contextlib.suppress(OSError):  # it may end while we look
            if not (task / "comm").read_text().startswith(_HARMLESS_THREADS):
                count += 1
    return count


def debugger() -> str | None:
    """The name of the debugger that is tracing this process, if one is."""
    import bdb

    # A debugger that was told to continue traces nothing any more, but is still on the stack.
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, bdb.Bdb):
            return type(owner).__name__.lower()
        frame = frame.f_back
    if "pydevd" in sys.modules:
        return "pydevd"
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12
    if monitoring is not None:
        name: str | None = monitoring.get_tool(monitoring.DEBUGGER_ID)
        return name
    return None


def no_rerun() -> str | None:
    """Why the command line of this process cannot be run again, or None when it can."""
    if under_pytest():
        return "it runs under pytest"
    if hasattr(sys, "ps1") or sys.flags.interactive or "ipykernel" in sys.modules:
        return "it is an interactive session"
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if file is None and sys.argv[:1] == ["-c"]:
        return "its program was given with python -c"
    # A program in an archive is a path through that archive.
    if file is None or not any(path.is_file() for path in (Path(file), *Path(file).parents)):
        return "its program came from standard input"
    return None


def under_pytest() -> bool:
    """Whether a test of pytest is running in this process."""
    return "_pytest.runner" in sys.modules and "PYTEST_CURRENT_TEST" in os.environ


def preload(modules: Iterable[str]) -> None:
    """Import once, before forking, what every rank would import by itself."""
    with process.collector_off(), process.unwarned():
        for name in modules:
            with contextlib.suppress(ImportError):  # whoever needs it will say so better
                importlib.import_module(name)


def refuse_import() -> None:
    """Raise ``Misuse`` in a process that only imports the script, and would launch it all again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise Misuse(
            "fabric.launch() was reached while a process that was just started, a rank or a "
            "worker of a DataLoader, imports the script; call it below if __name__ == '__main__':"
        )


class ForkedProcess:
    """A child made by ``os.fork``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative for a signal."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else's wait() took it, and its status
                self._code = 255
            else:
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
        return self._code


def fork_ranks(node: Node, supervisor: Supervisor) -> bool:
    """Fork every rank of a node. Returns whether this process is one of them.

    Every rank goes on with the parent's random streams (Python reseeds its own after a fork) and
    without what the parent's files hold in memory, which is written before.
    """
    process.flush_files()
    state = random.getstate()
    for local_rank in range(node.size):
        # A signal must find either no process or one that knows whose it is.
        with process.held_back():
            pid = _fork(local_rank, node.size)
            if pid:
                supervisor.children[local_rank] = ForkedProcess(pid)
                continue
            supervisor.disown()
            _become(node, local_rank)
            random.setstate(state)
            return True
    return False


def _fork(local_rank: int, size: int) -> int:
    with warnings.catch_warnings():
        # Threads that matter were ruled out before, or accepted by the user's launcher=.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return os.fork()
        except OSError as error:
            raise TorchweftError(
                f"cannot make process {local_rank} of {size} on this computer: {error.strerror}; "
                "ask for fewer devices, or see the limits on processes and memory (ulimit -a)"
            ) from error


def _become(node: Node, local_rank: int) -> None:
    """Make the process that was just forked that rank; it never goes on as anything else."""
    try:
        process.die_with_parent(node.supervisor)
        process.detach_from_parent()
        node.leave_to_supervisor()
        if local_rank != 0:
            process.close_stdin()
        node.enter(local_rank)
    except BaseException as error:
        process.record_failure(error)
        os._exit(1)
