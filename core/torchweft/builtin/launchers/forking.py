"""When a fork is safe, and forking a rank."""

from __future__ import annotations

import contextlib
import importlib
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

__all__ = ["ForkedProcess", "debugger", "fork_hazards", "fork_ranks", "no_rerun", "preload"]

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
    main = sys.modules.get("__main__")
    if "_pytest.runner" in sys.modules and "PYTEST_CURRENT_TEST" in os.environ:
        return "it runs under pytest"
    if hasattr(sys, "ps1") or sys.flags.interactive or "ipykernel" in sys.modules:
        return "it is an interactive session"
    arguments = sys.orig_argv[1:]
    if "-c" in arguments[: _first_positional(arguments) + 1]:
        return "its program was given with python -c"
    if not Path(getattr(main, "__file__", None) or "<stdin>").exists():
        return "its program came from standard input"
    return None


def _first_positional(arguments: list[str]) -> int:
    for index, argument in enumerate(arguments):
        if argument == "-c" or not argument.startswith("-"):
            return index
    return len(arguments)


def preload(modules: Iterable[str]) -> None:
    """Import once, before forking, what every rank would import by itself."""
    for name in modules:
        with contextlib.suppress(ImportError):  # whoever needs it will say so better
            importlib.import_module(name)


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


def fork_ranks(node: Node) -> dict[int, ForkedProcess] | None:
    """Fork every rank of a node. Returns the children, or None in each rank.

    Every rank goes on with the parent's random streams (Python reseeds its own after a fork) and
    without the parent's output, which is flushed before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    state = random.getstate()
    children: dict[int, ForkedProcess] = {}
    for local_rank in range(node.size):
        with warnings.catch_warnings():
            # Threads that matter were ruled out before, or accepted by the user's launcher=.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                pid = os.fork()
            except OSError:
                for child in children.values():
                    os.kill(child.pid, 9)
                raise
        if pid == 0:
            process.die_with_parent(node.supervisor)
            process.detach_from_parent()
            random.setstate(state)
            node.leave_to_supervisor()
            if local_rank != 0:
                process.close_stdin()
            node.enter(local_rank)
            return None
        children[local_rank] = ForkedProcess(pid)
    return children
