"""What launchers share whose processes somebody outside makes and ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torchweft import process
from torchweft.api import Launcher, RunPlan

__all__ = ["Outside"]


class Outside(Launcher):
    """Every process is a rank already, in an interpreter that is not ours."""

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
        # Whoever bound this process to some of the processor has divided it already.
        if process.usable_cores() == os.cpu_count():
            process.share_threads(plan.topology.processes_per_node)
        return function(*arguments) if function is not None else None
