"""``fabric.launch(function)``: processes that call a function and bring back rank 0's result."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from torchweft import process
from torchweft.api import Launcher, RunPlan
from torchweft.builtin.launchers.forking import (
    fork_hazards,
    fork_ranks,
    preload,
    refuse_import,
)
from torchweft.builtin.launchers.handing import pack_call
from torchweft.builtin.launchers.node import Node
from torchweft.builtin.launchers.results import Results, send_result
from torchweft.builtin.launchers.supervisor import Supervisor, ToldToEnd
from torchweft.errors import Misuse, RankFailed
from torchweft.failures import signal_name

__all__ = ["Fork", "ForkServer", "Spawn", "enter_rank", "guard_served_rank"]


class _FunctionLauncher(Launcher):
    """What fork, spawn and forkserver share."""

    name: str

    def launch(
        self,
        plan: RunPlan,
        function: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        *,
        fork_hazard: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """Call ``function(*arguments)`` in every rank; returns rank 0's result, on the CPU.

        None where rank 0 ended the program by itself, as ``sys.exit(0)`` does.
        """
        if self.is_rank(os.environ, self.name):
            return function(*arguments) if function is not None else None
        refuse_import()
        if function is None:
            raise Misuse(
                f"launcher '{self.name}' calls a function in every process, and fabric.launch() "
                "was called without one; pass the training function: fabric.launch(function)"
            )
        try:
            return self._run(plan, function, arguments, fork_hazard)
        except ToldToEnd as told:
            number = told.number
        # Ends this process as if it had no ranks, unless the program takes the signal itself.
        signal.raise_signal(number)
        raise RankFailed(f"the ranks were ended by {signal_name(number)}", exit_status=128 + number)

    def _run(
        self,
        plan: RunPlan,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        fork_hazard: Callable[[], str | None],
    ) -> Any:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        with receiver, Node(plan, self.name) as node, Supervisor(node.error_files) as supervisor:
            with sender:
                self._start(plan, node, supervisor, function, arguments, sender, fork_hazard)
            node.serve()
            results = Results(receiver)
            supervisor.wait(self._meanwhile(results, node))
            return results.take()

    def _meanwhile(self, results: Results, node: Node) -> Callable[[float], None]:
        """What is done between two looks at the ranks."""
        return results.idle

    def _start(
        self,
        plan: RunPlan,
        node: Node,
        supervisor: Supervisor,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        sender: Connection[Any, Any],
        fork_hazard: Callable[[], str | None],
    ) -> None:
        raise NotImplementedError


class Fork(_FunctionLauncher):
    """Forks of this process: whatever exists here exists there, nothing need be picklable."""

    name = "fork"

    def _start(
        self,
        plan: RunPlan,
        node: Node,
        supervisor: Supervisor,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        sender: Connection[Any, Any],
        fork_hazard: Callable[[], str | None],
    ) -> None:
        # Python threads are accepted, as a notebook has them; what would hang or crash is not.
        unsafe = fork_hazards(fork_hazard, threads=False)
        if unsafe:
            raise Misuse(
                f"launcher 'fork' cannot be used in this process: {' and '.join(unsafe)}; call "
                "fabric.launch(function) before such work, or use launcher='spawn' with a "
                "function that can be imported"
            )
        preload(plan.strategy.preload)
        if fork_ranks(node, supervisor):
            try:
                # What this process would do at its end belongs to the parent, not to a rank.
                process.forget_exit_handlers()
                _run_rank(function, arguments, sender)
            finally:
                os._exit(1)


class Spawn(_FunctionLauncher):
    """Fresh interpreters, which import the function: it and its arguments must be picklable."""

    name = "spawn"

    #: Why this was taken rather than a fork, where the user named neither.
    not_forked = ""

    def _start(
        self,
        plan: RunPlan,
        node: Node,
        supervisor: Supervisor,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        sender: Connection[Any, Any],
        fork_hazard: Callable[[], str | None],
    ) -> None:
        # A file rather than an argument: starting a process does not wait for it to read.
        call = node.folder / "call"
        call.write_bytes(pack_call(function, arguments, not_forked=self.not_forked))
        method = multiprocessing.get_start_method(allow_none=True)
        context: Any = multiprocessing.get_context(self.name)
        self._prepare(context, plan)
        for rank in range(node.size):
            child = context.Process(
                target=self._entrance(),
                args=(node.environ(rank), method, call, sender if rank == 0 else None),
                name=f"rank {rank}",
            )
            child.start()
            supervisor.children[rank] = child

    def _prepare(self, context: Any, plan: RunPlan) -> None:
        """What is done once before the first child."""

    def _entrance(self) -> Callable[..., NoReturn]:
        """What a child calls first; it has to be picklable."""
        return self._enter

    @staticmethod
    def _enter(
        environ: dict[str, str],
        method: str | None,
        call: Path,
        sender: Connection[Any, Any] | None,
    ) -> NoReturn:
        process.die_with_parent(_parent().pid)
        enter_rank(environ, method, call, sender)


class ForkServer(Spawn):
    """Forks of a fresh process that has imported torch once; picklable as for spawn."""

    name = "forkserver"

    def _prepare(self, context: Any, plan: RunPlan) -> None:
        context.set_forkserver_preload(process.served(plan.strategy.preload))

    @staticmethod
    def _enter(
        environ: dict[str, str],
        method: str | None,
        call: Path,
        sender: Connection[Any, Any] | None,
    ) -> NoReturn:
        guard_served_rank()
        enter_rank(environ, method, call, sender)


def guard_served_rank() -> None:
    """In a child of the fork server: become a rank that ends when its supervisor does."""
    # The parent is the fork server, which lives for as long as any of its processes.
    process.die_with_parent(os.getppid())
    code = process.fork_guarded(supervisor=_parent().sentinel)
    if code is not None:
        process.end_like(code)


def _parent() -> Any:
    """The process that called ``fabric.launch(function)``, as its child sees it."""
    return multiprocessing.parent_process()


def enter_rank(
    environ: dict[str, str],
    method: str | None,
    call: Path,
    sender: Connection[Any, Any] | None,
) -> NoReturn:
    """The first thing that a fresh process does once it is a rank."""
    try:
        os.environ.update(environ)
        process.claim(os.environ)
        process.as_main_process(method)
        # multiprocessing took it away from every child.
        process.open_stdin() if environ["LOCAL_RANK"] == "0" else process.close_stdin()
        process.share_threads(int(environ["LOCAL_WORLD_SIZE"]))
        function, arguments = pickle.loads(call.read_bytes())
    except BaseException as error:
        process.record_failure(error)
        process.end(1)
    _run_rank(function, arguments, sender)


def _run_rank(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    sender: Connection[Any, Any] | None,
) -> NoReturn:
    status = 0
    try:
        if sender is not None and os.environ["LOCAL_RANK"] != "0":
            sender.close()
        result = function(*arguments)
        if sender is not None and not sender.closed:
            send_result(result, sender)
    except BaseException as error:
        status = process.exit_status(error)
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            process.record_failure(error)
        elif status != 0:
            sys.last_value = error
    process.end(status)
