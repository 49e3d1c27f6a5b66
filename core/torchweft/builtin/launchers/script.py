"""``fabric.launch()`` in ``python train.py``: the process forks there and becomes a supervisor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torchweft import process
from torchweft.api import Launcher, RunPlan
from torchweft.builtin.launchers.forking import (
    debugger,
    fork_hazards,
    fork_ranks,
    no_rerun,
    preload,
    refuse_import,
    under_pytest,
)
from torchweft.builtin.launchers.function import Fork, Spawn
from torchweft.builtin.launchers.node import Node
from torchweft.builtin.launchers.supervisor import Supervisor, ToldToEnd
from torchweft.errors import Misuse, RankFailed

__all__ = ["Script"]

#: The launchers that make ranks for ``launch(function)``; in one of them it makes no more.
_MADE_BY = (Fork.name, Spawn.name)

#: Becomes the command given, in the same process, which then ends with its parent.
_BOUND_TO_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


class Script(Launcher):
    """Forks into its ranks where that is safe, and runs the command again where it is not.

    Either way ``launch()`` returns in the ranks alone: the process that called it supervises them
    and ends with their status, without running any of the script's code after the call.
    """

    def launch(
        self,
        plan: RunPlan,
        function: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        *,
        fork_hazard: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """Return in every rank; with a function, return rank 0's result in this process."""
        if self.is_rank(os.environ, "script"):
            if function is not None:
                return function(*arguments)
            if sys.platform != "linux":
                process.die_with_parent(os.getppid())
            process.share_threads(int(os.environ["LOCAL_WORLD_SIZE"]))
            # From here on every error is the supervisor's to tell.
            process.own_the_end()
            return None
        if function is not None and any(self.is_rank(os.environ, made) for made in _MADE_BY):
            return function(*arguments)
        refuse_import()
        if function is not None:
            return self._function(plan, function, arguments, fork_hazard)
        self._refuse_debugger(plan)
        unsafe = fork_hazards(fork_hazard)
        if under_pytest():
            unsafe.append("pytest would run on in every rank")
        if sys.gettrace() is not None:
            unsafe.append("a tracer is active")
        if hasattr(sys, "ps1"):
            unsafe.append("this is an interactive session")
        if unsafe:
            self._run_again(plan, unsafe)
        self._fork(plan)
        return None

    def _function(
        self,
        plan: RunPlan,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        fork_hazard: Callable[[], str | None],
    ) -> Any:
        interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
        unsafe = fork_hazards(fork_hazard, threads=not interactive)
        if not unsafe:
            return Fork().launch(plan, function, arguments, fork_hazard=fork_hazard)
        launcher = Spawn()
        launcher.not_forked = " and ".join(unsafe)
        return launcher.launch(plan, function, arguments, fork_hazard=fork_hazard)

    def _refuse_debugger(self, plan: RunPlan) -> None:
        name = debugger()
        if name is not None:
            raise Misuse(
                f"fabric.launch() cannot make {plan.topology.world_size} processes under the "
                f"debugger {name}, which follows one; put breakpoint() into the script and start "
                f"it with 'torchweft run --devices {plan.topology.processes_per_node} …', pass "
                "the training function to fabric.launch(function), or debug with devices=1"
            )

    def _fork(self, plan: RunPlan) -> None:
        preload(plan.strategy.preload)
        node = Node(plan, "script")
        supervisor = Supervisor(node.error_files, pass_on=process.NOTICE)
        supervisor.__enter__()
        try:
            is_rank = fork_ranks(node, supervisor)
        except BaseException:
            supervisor.__exit__(None, None, None)
            node.close()
            raise
        if is_rank:
            process.own_the_end()
            return
        self._supervise(node, supervisor)

    def _run_again(self, plan: RunPlan, unsafe: list[str]) -> NoReturn:
        reason = no_rerun()
        if reason is not None:
            raise Misuse(
                f"fabric.launch() can neither fork this process into "
                f"{plan.topology.world_size} ranks, because {' and '.join(unsafe)}, nor run its "
                f"command again, because {reason}; pass the training function to "
                "fabric.launch(function), or put the script into a file and start it with "
                f"'torchweft run --devices {plan.topology.processes_per_node} train.py'"
            )
        process.write_error(
            f"torchweft: {' and '.join(unsafe)}; so instead of forking here, the command is run "
            f"again for each of the {plan.topology.world_size} ranks\n"
        )
        process.flush_files()
        node = Node(plan, "script")
        supervisor = Supervisor(node.error_files, pass_on=process.NOTICE)
        supervisor.__enter__()
        try:
            for rank in range(node.size):
                supervisor.children[rank] = _start(node.environ(rank), rank)
        except BaseException:
            supervisor.__exit__(None, None, None)
            node.close()
            raise
        self._supervise(node, supervisor)

    def _supervise(self, node: Node, supervisor: Supervisor) -> NoReturn:
        """Do this process's last work.

        Neither the rest of the script nor its ``finally`` blocks are its own any more, they are
        the ranks'.
        """
        status = 1
        try:
            node.serve()
            supervisor.wait()
            status = 0
        except RankFailed as failure:
            process.write_error(f"torchweft: {failure}\n")
            status = failure.exit_status
        except ToldToEnd as told:
            status = 128 + told.number
        except BaseException as error:
            process.write_error(process.format_error(error))
        finally:
            supervisor.stop()
            node.close()
            os._exit(status)


class _Command:
    """A child that runs this process's command again."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._popen.poll()


def _start(environ: Mapping[str, str], rank: int) -> _Command:
    command = [sys.executable, *sys.orig_argv[1:]]
    if sys.platform == "linux":
        # What does the binding may not run between a fork and an exec where threads are.
        command = [sys.executable, "-ISc", _BOUND_TO_PARENT, str(os.getpid()), *command]
    stdin = None if rank == 0 else subprocess.DEVNULL
    return _Command(
        subprocess.Popen(command, env=dict(environ), stdin=stdin, cwd=_folder_of_command())
    )


def _folder_of_command() -> str | None:
    """Where the command's words mean what they meant; the script may have gone elsewhere since."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None) or ""
    if getattr(main, "__spec__", None) is None:  # a script by its path
        for word in sys.orig_argv[1:]:
            tail = os.sep + word.removeprefix(f".{os.sep}")
            if file.endswith(tail):
                return file.removesuffix(tail) or os.sep
    return process.FIRST_FOLDER
