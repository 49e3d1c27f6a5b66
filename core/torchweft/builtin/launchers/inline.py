"""Nobody makes a process: the one that runs already is the whole run."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

from torchweft.api import Launcher, RankInfo, Rendezvous, RunPlan

__all__ = ["Inline"]


class Inline(Launcher):
    """One process."""

    owns_ranks = False

    def launch(
        self,
        plan: RunPlan,
        function: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        *,
        fork_hazard: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """Call the function, if there is one."""
        return function(*arguments) if function is not None else None

    def rank(self, environ: Mapping[str, str]) -> RankInfo:
        """The only rank. The environment may describe somebody else's run and is not read."""
        return RankInfo(run_id=uuid.uuid4().hex[:16])

    def rendezvous(self, rank: RankInfo, environ: Mapping[str, str]) -> Rendezvous:
        """Nobody to meet: the store lives in this process, without a port."""
        return Rendezvous(hosts=True, prefix=f"torchweft/{rank.run_id}/0")
