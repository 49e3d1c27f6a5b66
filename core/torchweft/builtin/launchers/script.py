"""``fabric.launch()`` in ``python train.py``: the process forks there and becomes a supervisor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torchweft.api import Launcher, RunPlan
from torchweft.builtin.launchers.forking import (
    debugger,
    fork_hazards,
    fork_ranks,
    no_rerun,
    preload,
)
from torchweft.builtin.launchers.function import Fork, Spawn
from torchweft.builtin.launchers.node import Node
from torchweft.builtin.launchers.supervisor import Supervisor
from torchweft.errors import Misuse, RankFailed

__all__ = ["Script"]


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
            return function(*arguments) if function is not None else None
        if function is not None:
            return self._function(plan, function, arguments, fork_hazard)
        self._refuse_debugger(plan)
        unsafe = fork_hazards(fork_hazard)
        if no_rerun() == "it runs under pytest":
            unsafe.append("pytest would run on in every rank")
        if sys.gettrace() is not None:
            unsafe.append("a tracer is active")
        if hasattr(sys, "ps1"):
            unsafe.append("this is an interactive session")
        if not unsafe:
            return self._fork(plan)
        return self._run_again(plan, unsafe)

    def _function(
        self,
        plan: RunPlan,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        fork_hazard: Callable[[], str | None],
    ) -> Any:
        interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
        launcher: Launcher = Spawn()
        if not fork_hazards(fork_hazard, threads=not interactive):
            launcher = Fork()
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
        children = fork_ranks(node)
        if children is None:
            return
        status = 1
        try:
            node.serve()
            status = _supervise(Supervisor(dict(children), node.error_files))
        finally:
            # This process has done its part: neither the rest of the script nor its finally
            # blocks are its own any more, they are the ranks'.
            node.close()
            os._exit(status)

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
        sys.stderr.write(
            f"torchweft: {' and '.join(unsafe)}; so instead of forking here, the command is run "
            f"again for each of the {plan.topology.world_size} ranks\n"
        )
        sys.stderr.flush()
        sys.stdout.flush()
        status = 1
        node = Node(plan, "script")
        try:
            node.serve()
            children = {rank: _start(node.environ(rank), rank) for rank in range(node.size)}
            status = _supervise(Supervisor(dict(children), node.error_files))
        finally:
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
    stdin = None if rank == 0 else subprocess.DEVNULL
    return _Command(subprocess.Popen(command, env=dict(environ), stdin=stdin))


def _supervise(supervisor: Supervisor) -> int:
    try:
        supervisor.wait()
    except RankFailed as failure:
        sys.stderr.write(f"torchweft: {failure}\n")
        sys.stderr.flush()
        return failure.exit_status
    except KeyboardInterrupt:
        return 130
    return 0
