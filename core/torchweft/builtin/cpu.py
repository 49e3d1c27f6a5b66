"""The processor as an accelerator: any number of processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchweft.api import Accelerator, RankInfo

__all__ = ["CPU"]


class CPU(Accelerator):
    """Every process computes on the host; its device is ``cpu``."""

    backend = "gloo"
    host_memory = True

    def bind(self, rank: RankInfo, devices: Sequence[int]) -> torch.device:
        """The one host device, for every rank."""
        return torch.device("cpu")
