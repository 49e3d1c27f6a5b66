"""What happens in every process: rank, device, process group, contexts, then user code."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchweft import process
from torchweft.api import Accelerator, Launcher, Place, Precision, Rendezvous, Run, Strategy
from torchweft.errors import BrokenPlugin
from torchweft.handoff import Handoff
from torchweft.manager import Manager
from torchweft.plan import RunPlan
from torchweft.specs import load_target
from torchweft.watchdog import Watchdog

__all__ = ["Live", "Parts", "join", "stay"]


@dataclass(slots=True, kw_only=True)
class Parts:
    """The four objects that a plan names, constructed but not started."""

    accelerator: Accelerator
    strategy: Strategy
    precision: Precision
    launcher: Launcher

    @classmethod
    def build(cls, plan: RunPlan, given: Mapping[str, Any]) -> Parts:
        """Construct what the plan names, with its options; ``given`` objects are taken as is."""
        made: dict[str, Any] = {}
        for decision in plan.decisions:
            kind = decision.kind
            if kind in given:
                made[kind] = given[kind]
                continue
            factory = load_target(decision.spec.target, decision.provider)
            try:
                made[kind] = factory(**plan.options.get(kind, {}))
            except TypeError as error:
                raise BrokenPlugin(
                    f"{kind} '{decision.spec.name}' ({decision.provider}) cannot be constructed: "
                    f"{error}"
                ) from error
        return cls(**made)


@dataclass(slots=True, kw_only=True)
class Live:
    """A run that this process has joined, and how it leaves it."""

    run: Run
    contexts: ExitStack = field(default_factory=ExitStack)
    left: bool = False

    def leave(self, failed: bool) -> None:
        """Leave the plugins' contexts in reverse order, then the process group. Once."""
        if self.left:
            return
        self.left = True
        if not failed:
            process.record_done()
        error = getattr(sys, "last_value", None) if failed else None
        kind = type(error) if error is not None else None
        trace = error.__traceback__ if error is not None else None
        try:
            self.contexts.__exit__(kind, error, trace)
        finally:
            self.run.strategy.stop(failed)


def join(plan: RunPlan, parts: Parts, manager: Manager, environ: Mapping[str, str]) -> Live:
    """Become a rank of the run: everything that user code relies on exists afterwards."""
    process.tell_stacks()
    handoff = Handoff.read(environ)
    rank = parts.launcher.rank(environ)
    rendezvous = parts.launcher.rendezvous(rank, environ)
    device = parts.accelerator.bind(rank, plan.topology.devices)
    parts.precision.start(device)
    parts.strategy.start(
        Place(
            plan=plan,
            rank=rank,
            rendezvous=rendezvous,
            accelerator=parts.accelerator,
            device=device,
            precision=parts.precision,
            timeout=(handoff.timeout if handoff else None) or 0.0,
        )
    )
    strategy = parts.strategy
    if vars(strategy).get("place") is None:
        raise BrokenPlugin(
            f"{type(strategy).__name__}.start() of strategy '{plan.strategy.name}' did not set "
            "self.place; it must begin with super().start(place)"
        )
    live = Live(
        run=Run(
            plan=plan,
            rank=rank,
            accelerator=parts.accelerator,
            device=device,
            strategy=parts.strategy,
            precision=parts.precision,
            collectives=parts.strategy.collectives,
        )
    )
    if handoff is not None and handoff.timeout is not None and rank.world_size > 1:
        _watch(live.run, rendezvous, handoff, handoff.timeout)
    process.record_joined()
    for context in manager.worker_contexts(live.run):
        live.contexts.enter_context(context)
    return live


def _watch(run: Run, rendezvous: Rendezvous, handoff: Handoff, timeout: float) -> None:
    """Look for collective operations that take too long."""
    lasting = Path(tempfile.gettempdir(), f"torchweft-stacks-{handoff.run_id}")
    watchdog = Watchdog(
        timeout=timeout,
        folder=Path(handoff.log_dir) if handoff.log_dir and handoff.log_stays else lasting,
        rank=run.rank,
        rendezvous=rendezvous,
        accelerator=run.accelerator,
    )
    watchdog.start()


def stay(live: Live, *, owned: bool) -> None:
    """Leave the run when this interpreter's script has ended."""
    if owned:
        process.own_the_end()
    elif live.run.rank.world_size > 1:
        process.end_with_the_others(live.run.rank.rank, live.run.rank.world_size)
    # A group's destructors may wait for other ranks; where there never was one, Python's own
    # teardown is left to do its work.
    keep = live.run.rank.world_size > 1 or (dist.is_available() and dist.is_initialized())
    process.stay_until_the_end(live.leave, keep=keep)
