"""What ``fabric.setup`` and ``fabric.setup_dataloaders`` return in place of the user's objects."""

from __future__ import annotations

from typing import Any

from torchweft.wrappers.module import FabricModule
from torchweft.wrappers.optimizer import FabricOptimizer, wrap_optimizer

__all__ = ["FabricModule", "FabricOptimizer", "is_wrapped", "wrap_optimizer"]


def is_wrapped(value: Any) -> bool:
    """Whether ``value`` is a model, optimizer or loader that was set up."""
    from torchweft.wrappers.dataloader import FabricDataLoader

    return isinstance(value, FabricModule | FabricOptimizer | FabricDataLoader)
