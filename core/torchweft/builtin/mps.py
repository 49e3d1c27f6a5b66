"""Apple's GPU as an accelerator: one per computer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchweft.api import Accelerator, RankInfo
from torchweft.errors import NotAvailable

__all__ = ["MPS"]


class MPS(Accelerator):
    """The GPU built into an Apple computer."""

    def bind(self, rank: RankInfo, devices: Sequence[int]) -> torch.device:
        """The one device. Raises ``NotAvailable`` when this torch was built without it."""
        if not torch.backends.mps.is_available():
            raise NotAvailable(
                f"accelerator 'mps' was chosen, but torch {torch.__version__} cannot use it here; "
                "install a build for macOS 13 or newer, or use accelerator='cpu'"
            )
        return torch.device("mps")

    def fork_hazard(self) -> str | None:
        """Metal does not survive a fork."""
        return "Metal cannot be used in a forked process"

    def rng_state(self) -> Any:
        """A byte tensor."""
        return torch.mps.get_rng_state()

    def set_rng_state(self, state: Any) -> None:
        """Restore it."""
        torch.mps.set_rng_state(state)

    def memory(self) -> dict[str, int]:
        """Bytes that tensors take."""
        return {"allocated": torch.mps.current_allocated_memory()}

    def synchronize(self) -> None:
        """Wait for the queue."""
        torch.mps.synchronize()
