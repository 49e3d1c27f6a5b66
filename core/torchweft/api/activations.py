"""Activation checkpointing: what a module computed is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchweft.api.initialising import default_dtype

__all__ = ["checkpoint_activations"]


def checkpoint_activations(module: nn.Module) -> None:
    """Keep the inputs of ``module``'s forward pass alone, and compute the rest again when needed.

    Chen et al., 2016 (arXiv:1604.06174). Names of parameters and modules stay as they are, which
    torch's own wrapper would change.
    """
    forward: Callable[..., Any] = module.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Of this pass; the backward pass is not within the precision's context.
        dtype = torch.get_default_dtype()

        def compute(*args: Any, **kwargs: Any) -> Any:
            with default_dtype(dtype):
                return forward(*args, **kwargs)

        return checkpoint(compute, *args, use_reentrant=False, **kwargs)

    # Set on the object, so that hooks, such as those that gather parameters, stay around it.
    module.forward = run
