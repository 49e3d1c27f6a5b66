"""``fabric.launch(function)``: processes that call a function and bring back rank 0's result."""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from torch import Tensor

from torchweft import process
from torchweft.api import Launcher, RunPlan
from torchweft.builtin.launchers.forking import fork_hazards, fork_ranks, preload
from torchweft.builtin.launchers.node import Node
from torchweft.builtin.launchers.supervisor import Child, Supervisor
from torchweft.errors import Misuse, TorchweftError

__all__ = ["Fork", "ForkServer", "Spawn"]


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
        """Call ``function(*arguments)`` in every rank; returns rank 0's result, on the CPU."""
        if self.is_rank(os.environ, self.name):
            return function(*arguments) if function is not None else None
        if function is None:
            raise Misuse(
                f"launcher '{self.name}' calls a function in every process, and fabric.launch() "
                "was called without one; pass the training function: fabric.launch(function)"
            )
        with Node(plan, self.name) as node:
            receiver, sender = multiprocessing.Pipe(duplex=False)
            children = self._start(plan, node, function, arguments, sender, fork_hazard)
            sender.close()
            node.serve()
            results = _Results(receiver)
            try:
                Supervisor(children, node.error_files).wait(results.idle)
            finally:
                receiver.close()
            return results.take()

    def _start(
        self,
        plan: RunPlan,
        node: Node,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        sender: Connection[Any, Any],
        fork_hazard: Callable[[], str | None],
    ) -> dict[int, Child]:
        raise NotImplementedError


class Fork(_FunctionLauncher):
    """Forks of this process: whatever exists here exists there, nothing need be picklable."""

    name = "fork"

    def _start(
        self,
        plan: RunPlan,
        node: Node,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        sender: Connection[Any, Any],
        fork_hazard: Callable[[], str | None],
    ) -> dict[int, Child]:
        # Python threads are accepted, as a notebook has them; what would hang or crash is not.
        unsafe = fork_hazards(fork_hazard, threads=False)
        if unsafe:
            raise Misuse(
                f"launcher 'fork' cannot be used in this process: {' and '.join(unsafe)}; call "
                "fabric.launch(function) before such work, or use launcher='spawn' with a "
                "function that can be imported"
            )
        preload(plan.strategy.preload)
        children = fork_ranks(node)
        if children is None:
            # What this process would do at its end belongs to the parent, not to a rank.
            atexit._clear()
            _run_rank(function, arguments, sender)
        return dict(children)


class Spawn(_FunctionLauncher):
    """Fresh interpreters, which import the function: it and its arguments must be picklable."""

    name = "spawn"

    def _start(
        self,
        plan: RunPlan,
        node: Node,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        sender: Connection[Any, Any],
        fork_hazard: Callable[[], str | None],
    ) -> dict[int, Child]:
        payload = _pack(function, arguments)
        context: Any = multiprocessing.get_context(self.name)
        self._prepare(context, plan)
        children: dict[int, Child] = {}
        for rank in range(node.size):
            child = context.Process(
                target=_enter_rank,
                args=(node.environ(rank), payload, sender if rank == 0 else None),
            )
            child.start()
            children[rank] = child
        return children

    def _prepare(self, context: Any, plan: RunPlan) -> None:
        """What is done once before the first child."""


class ForkServer(Spawn):
    """Forks of a fresh process that has imported torch once; picklable as for spawn."""

    name = "forkserver"

    def _prepare(self, context: Any, plan: RunPlan) -> None:
        context.set_forkserver_preload(["torch", "torchweft.fabric", *plan.strategy.preload])


class _Results:
    """Reads what rank 0 sends while the ranks are watched."""

    def __init__(self, receiver: Connection[Any, Any]) -> None:
        self._receiver = receiver
        self._data: bytes | None = None
        self._open = True

    def idle(self, seconds: float) -> None:
        """Wait up to ``seconds`` for the result."""
        if not self._open:
            # Nothing more will come; the supervisor only waits for the processes to end.
            time.sleep(seconds)
            return
        try:
            if self._receiver.poll(seconds):
                self._data = self._receiver.recv_bytes()
        except (EOFError, OSError):
            self._open = False

    def take(self) -> Any:
        """The result, once every rank has ended well."""
        while self._data is None and self._open:
            self.idle(0.1)
        return None if self._data is None else pickle.loads(self._data)


def _enter_rank(
    environ: dict[str, str], payload: bytes, sender: Connection[Any, Any] | None
) -> NoReturn:
    """The first thing that a spawned rank does."""
    os.environ.update(environ)
    # A fork server's children have the server as parent, which ends with the supervisor.
    process.die_with_parent(os.getppid())
    process.claim(os.environ)
    process.share_threads(int(environ["LOCAL_WORLD_SIZE"]))
    function, arguments = pickle.loads(payload)
    _run_rank(function, arguments, sender)


def _run_rank(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    sender: Connection[Any, Any] | None,
) -> NoReturn:
    status = 0
    try:
        result = function(*arguments)
        if sender is not None and os.environ["LOCAL_RANK"] == "0":
            sender.send_bytes(_pack_result(result))
    except BaseException as error:
        status = process.exit_status(error)
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            process.record_failure(error)
    process.end(status)


class _OnCpu(pickle.Pickler):
    """Pickles tensors as CPU tensors, wherever they hide."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return value.detach().cpu().__reduce_ex__(4)  # type: ignore[no-untyped-call]
        return NotImplemented


def _pack_result(result: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        _OnCpu(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(result)
    except Exception as error:
        kind = f"{type(result).__module__}.{type(result).__qualname__}"
        raise TorchweftError(
            f"the function given to fabric.launch() returned a {kind} in rank 0, which cannot be "
            f"pickled and so not be brought back: {error}; return tensors, numbers or a "
            "state_dict() instead"
        ) from error
    return buffer.getvalue()


def _pack(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    """Pickle once for all ranks, plainly: torch's own pickling would share tensors' memory."""
    try:
        return pickle.dumps((function, arguments), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        culprit = _culprit(function, arguments)
        raise Misuse(
            f"fresh processes cannot be given {culprit}, which cannot be pickled: {error}; define "
            "it at the top level of a module, or use launcher='fork', which pickles nothing"
        ) from error


def _culprit(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    named: list[tuple[str, Any]] = [("the function", function)]
    for argument in arguments:
        named += _parts(argument)
    for name, value in named:
        try:
            pickle.dumps(value)
        except Exception:
            return name
    return "an argument"


def _parts(argument: Any) -> list[tuple[str, Any]]:
    describe = getattr(argument, "picklable_parts", None)
    if describe is not None:
        return list(describe())
    return [(f"the argument {argument!r:.60}", argument)]
