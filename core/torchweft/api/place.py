"""Where a strategy starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchweft.api.accelerator import Accelerator
from torchweft.api.precision import Precision
from torchweft.plan import RunPlan
from torchweft.rank import RankInfo, Rendezvous

__all__ = ["Place"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Everything that is settled before a strategy starts in a process.

    Attributes:
        plan: what was decided.
        rank: who this process is.
        rendezvous: where the ranks meet; ``join_group`` and ``open_store`` take it from here.
        accelerator: the live one; its ``backend`` is that of collectives.
        device: of this process.
        precision: the live one.
        timeout: seconds that a collective may take, where somebody else watches over it; the
            group's own limit has to be longer. 0: nobody does.
    """

    plan: RunPlan
    rank: RankInfo
    rendezvous: Rendezvous
    accelerator: Accelerator
    device: torch.device
    precision: Precision
    timeout: float = 0.0
