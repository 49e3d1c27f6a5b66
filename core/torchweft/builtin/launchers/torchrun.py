"""torch's elastic agent made this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchweft.api import Launcher, RankInfo, Rendezvous, RunPlan

__all__ = ["Torchrun"]


class Torchrun(Launcher):
    """Started by ``torchweft run --devices N`` or by ``torchrun``; every process is a rank."""

    owns_ranks = False

    def launch(
        self,
        plan: RunPlan,
        function: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        *,
        fork_hazard: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """Call the function, if there is one, in this rank; its own result comes back."""
        return function(*arguments) if function is not None else None

    def rendezvous(self, rank: RankInfo, environ: Mapping[str, str]) -> Rendezvous:
        """The agent's store, or one that rank 0 hosts where the agent shares none."""
        shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # Each node counts its own restarts: in a store of this round alone they would tell ranks
        # of one round apart.
        attempt = f"/{rank.restart}" if shared else ""
        return Rendezvous(
            address=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
            hosts=rank.rank == 0 and not shared,
            prefix=f"torchweft/{rank.run_id}{attempt}",
        )
