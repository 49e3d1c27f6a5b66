"""The process out of which ``torchweft run`` forks its ranks: its beginning and its end.

Imports ``multiprocessing`` where it is needed: a command that makes no processes does without.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

from torchweft import process

__all__ = ["end_fork_server", "start_fork_server"]


def start_fork_server(modules: Iterable[str]) -> None:
    """Start the process that imports torch once and forks every rank, restarts included.

    ``modules``: what it imports beside that.
    """
    import multiprocessing
    import multiprocessing.util
    from importlib.machinery import ModuleSpec
    from multiprocessing import forkserver, resource_tracker

    # What a rank re-imports as __main__ is the script, never this command.
    sys.modules["__main__"].__spec__ = ModuleSpec("torchweft.__main__", None)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        process.served(["torchweft.builtin.launchers.agent_rank", *modules])
    )
    # Python looks into a server's current folder first, where the user's files may hide a library.
    here = os.open(".", os.O_RDONLY)
    resource_tracker.ensure_running()  # first: it lets signals in again
    # A terminal's Ctrl-C is for the command, which ends the server, and for ranks, which let it in.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        os.chdir(multiprocessing.util.get_temp_dir())
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.fchdir(here)
        os.close(here)


def end_fork_server() -> None:
    """End it, which may be in the middle of an import, and remove the folder with its socket."""
    if "multiprocessing" not in sys.modules:
        return
    import multiprocessing.util
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver
    with contextlib.suppress(Exception):
        if server._forkserver_pid is not None:
            os.kill(server._forkserver_pid, signal.SIGKILL)
    with contextlib.suppress(Exception):
        multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]
