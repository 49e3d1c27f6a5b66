"""One process's live part of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch

from torchweft.api.accelerator import Accelerator
from torchweft.api.collectives import Collectives
from torchweft.api.precision import Precision
from torchweft.api.strategy import Strategy
from torchweft.plan import RunPlan
from torchweft.rank import RankInfo

__all__ = ["Run"]


@dataclass(slots=True, kw_only=True)
class Run:
    """What exists in a process once it has joined: one per process, never pickled.

    Built in the order rank, device, strategy, collectives.

    Attributes:
        plan: what was decided.
        rank: who this process is.
        accelerator: the live one.
        device: of this process.
        strategy: the live one.
        precision: the live one.
        collectives: between the processes of the run.
    """

    plan: RunPlan
    rank: RankInfo
    accelerator: Accelerator
    device: torch.device
    strategy: Strategy
    precision: Precision
    collectives: Collectives

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Run belongs to its process and cannot be pickled; pickle run.plan")
