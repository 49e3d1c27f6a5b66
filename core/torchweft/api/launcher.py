"""The base class of launchers: who makes the processes of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torchweft.handoff import Handoff
from torchweft.plan import RunPlan
from torchweft.rank import RankInfo, Rendezvous

__all__ = ["Launcher"]


class Launcher(ABC):
    """Makes processes, or finds out who this process is when somebody else made it.

    A complete launcher for processes that a cluster called grid made, declared by
    ``LauncherSpec(name="grid", target="my_package.grid:Grid", detect="my_package.detect:grid",
    nodes="any", outside=True)``::

        class Grid(Launcher):
            owns_ranks = False

            def launch(self, plan, function, arguments, *, fork_hazard=lambda: None):
                return function(*arguments) if function is not None else None

            def rank(self, environ):
                return RankInfo(
                    rank=int(environ["GRID_TASK"]),
                    world_size=int(environ["GRID_TASKS"]),
                    local_rank=int(environ["GRID_LOCAL_TASK"]),
                    local_world_size=int(environ["GRID_LOCAL_TASKS"]),
                    run_id=environ["GRID_JOB"],
                )

            def rendezvous(self, rank, environ):
                host, port = environ["GRID_HEAD"].split(":")
                first = rank.rank == 0
                prefix = f"grid/{rank.run_id}"
                return Rendezvous(address=host, port=int(port), hosts=first, prefix=prefix)

    A second module, free of torch, finds out whether the cluster made this process::

        def grid(environ):
            if "GRID_JOB" not in environ:
                return None
            return Detection(
                reason="grid started this process",
                world_size=int(environ["GRID_TASKS"]),
                processes_per_node=int(environ["GRID_LOCAL_TASKS"]),
                processes_hint="write 'grid --local-tasks={wanted}'",
            )

    ``rank`` and ``rendezvous`` of the base class read the variables that torchrun sets, and take
    it that whoever started the ranks serves the store at ``MASTER_ADDR`` and ``MASTER_PORT``.
    """

    #: Whether the interpreter of a rank belongs to this launcher, which then ends it, rather
    #: than to somebody outside.
    owns_ranks: ClassVar[bool] = True

    @abstractmethod
    def launch(
        self,
        plan: RunPlan,
        function: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        *,
        fork_hazard: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """Make the processes of ``plan``.

        With a function: call ``function(*arguments)`` in every rank and return what rank 0
        returned. Without: return in every rank, and only there. ``fork_hazard`` is the
        accelerator's reason against forking this process.

        Raises:
            RankFailed: when a rank ended with an error; all others have been ended too.
        """

    def rank(self, environ: Mapping[str, str]) -> RankInfo:
        """Who this process is. Called in every rank, after ``launch``."""
        return RankInfo.from_environ(environ)

    def rendezvous(self, rank: RankInfo, environ: Mapping[str, str]) -> Rendezvous:
        """Where this rank meets the others."""
        return Rendezvous(
            address=environ.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environ.get("MASTER_PORT", "0")),
            prefix=f"torchweft/{rank.run_id}/{rank.restart}",
        )

    def is_rank(self, environ: Mapping[str, str], name: str) -> bool:
        """Whether this process was already made by the launcher called ``name``."""
        handoff = Handoff.read(environ)
        return handoff is not None and handoff.launcher == name
