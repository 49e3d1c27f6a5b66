"""torch's elastic agent, which tells why ranks begin anew, and whose failure it was."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    WorkerGroup,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from torchweft import process
from torchweft.cli.attempts import Attempts
from torchweft.errors import TorchweftError
from torchweft.failures import first_failure

__all__ = ["agent_of"]

#: Seconds until another node, whose ranks ended first, waits at the rendezvous, and this one knows:
#: torch asks once in a second.
_LATEST = 3.0
_TICK = 0.05
#: Seconds in which ranks that lose those of a missing node fail by themselves.
_MOMENT = 5.0


class _Agent(LocalElasticAgent):
    """One node's agent.

    Nodes learn at different times that another one waits to take part. The first ends its ranks,
    whereupon those of the others fail or, if their script asks for that, leave. torch would take
    the one for a failure that counts and the other for the end of the run.

    Nor does it act on a node that is missed: ranks wait for those of a computer without power, or
    that has gone while they were about to meet, for as long as an operation may take.

    Args:
        attempts: what the ranks leave.
        elastic: whether nodes may come and go.
        leaving: whether this node was told to end.
        heard: whether another node has told why the run ends.
    """

    def __init__(
        self,
        *given: Any,
        attempts: Attempts,
        elastic: bool,
        leaving: Callable[[], bool],
        heard: Callable[[], bool],
        **named: Any,
    ) -> None:
        super().__init__(*given, **named)
        self._attempts = attempts
        self._elastic = elastic
        self._leaving = leaving
        self._heard = heard
        #: Attempts that have begun, as the restarts that they cost count them.
        self._begun = 0
        self._ended: RunResult | None = None
        self._missed_since: float | None = None
        self._lost = ""

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        # torch returns nothing where the run went on without this node until it was over.
        result: RunResult | None = super().run(role)
        return result or RunResult(state=WorkerState.SUCCEEDED)

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        attempt = worker_group.spec.max_restarts - self._remaining_restarts + 1
        if self._begun:
            if attempt > self._begun:
                self._attempts.tell(attempt, self._lost)
            self._attempts.forget()
        self._begun = attempt
        self._missed_since, self._lost, self._ended = None, "", None
        super()._initialize_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # Of ranks that have ended torch can be asked once.
        result: RunResult = self._ended or super()._monitor_workers(worker_group)
        if self._elastic and result.state == WorkerState.HEALTHY and self._misses(worker_group):
            if self._remaining_restarts == 0:
                self._shutdown(signal.SIGKILL)
                raise TorchweftError(
                    f"{self._lost}; see whether its computer, the network or its command was "
                    "ended, or let the others begin anew with --max-restarts"
                )
            return RunResult(state=WorkerState.FAILED)
        if self._elastic and self._for_another(result) and self._somebody_waits(worker_group):
            # Upon which ranks begin anew together with whoever waits.
            self._ended = result
            return RunResult(state=WorkerState.HEALTHY)
        if self._leaving() and result.state == WorkerState.FAILED:
            self._remaining_restarts = 0  # who was told to end does not begin anew
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        if self._lost:  # they wait inside of a library, and mind no signal there
            self._shutdown(signal.SIGKILL)
        else:
            super()._stop_workers(worker_group)

    def _misses(self, worker_group: WorkerGroup) -> bool:
        """Whether nodes of this round have gone, and the ranks here do not notice."""
        # Of torch's own rendezvous, which looks for the others once in a second.
        handler: Any = worker_group.spec.rdzv_handler
        holder = getattr(handler, "_state_holder", None)
        if holder is None or holder.state.closed:
            return False
        nodes = worker_group.group_world_size or 0
        missing = nodes - len(holder.state.participants)
        if missing <= 0:
            self._missed_since = None
            return False
        now = time.monotonic()
        self._missed_since = self._missed_since or now
        if now - self._missed_since < _MOMENT or self._leave():
            return False
        have = "has" if missing == 1 else "have"
        who = f"{missing} of {nodes} nodes {have} not been heard of"
        if handler._this_node not in holder.state.participants:
            who = "this node, or its network, was not there: the others have not heard of it"
        self._lost = (
            f"{who} for some time (--rdzv-conf keep_alive_interval, keep_alive_max_attempt)"
        )
        return True

    def _leave(self) -> bool:
        """Whether ranks here end by themselves, and need the others no more."""
        files = (process.stopping_file, process.done_file)
        return self._leaving() or any(self._attempts.beside(file) for file in files)

    def _for_another(self, result: RunResult) -> bool:
        """Whether the ranks ended because those of another node did."""
        if self._leaving():
            return False
        if result.state == WorkerState.SUCCEEDED:
            return bool(self._attempts.beside(process.stopping_file))
        if result.state == WorkerState.FAILED:
            failures = self._attempts.failures(result.failures)
            return bool(failures) and first_failure(failures).consequence
        return False

    def _somebody_waits(self, worker_group: WorkerGroup) -> bool:
        deadline = time.monotonic() + _LATEST
        handler = worker_group.spec.rdzv_handler
        with contextlib.suppress(RendezvousError):  # it went: so nobody does
            while time.monotonic() < deadline and not self._heard():
                if handler.num_nodes_waiting() > 0:
                    return True
                if handler.is_closed():
                    break
                time.sleep(_TICK)
        return False


@contextlib.contextmanager
def agent_of(
    attempts: Attempts, *, elastic: bool, leaving: Callable[[], bool], heard: Callable[[], bool]
) -> Iterator[None]:
    """Have torch's launcher make such an agent, for which it has no parameter."""
    launcher: Any = api
    launcher.LocalElasticAgent = functools.partial(
        _Agent, attempts=attempts, elastic=elastic, leaving=leaving, heard=heard
    )
    try:
        yield
    finally:
        launcher.LocalElasticAgent = LocalElasticAgent
