"""Activation checkpointing: what a module computed is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_activations"]


def checkpoint_activations(module: nn.Module) -> None:
    """Keep the inputs of ``module``'s forward pass alone, and compute the rest again when needed.

    Chen et al., 2016 (arXiv:1604.06174). Names of parameters and modules stay as they are, which
    torch's own wrapper would change.
    """
    forward: Callable[..., Any] = module.forward
    # Set on the object, so that hooks, such as those that gather parameters, stay around it.
    module.forward = partial(checkpoint, forward, use_reentrant=False)
