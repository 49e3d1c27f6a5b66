"""What a sharded module returns, kept from being changed in a way that would go unnoticed."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from torchweft.api import map_leaves

__all__ = ["refuse_changes_in_place"]


def refuse_changes_in_place(module: nn.Module) -> None:
    """Make an error of changing in place what ``module`` returns, where that is a view.

    ``fully_shard`` hangs a hook on its outputs, which gathers parameters for the backward pass. An
    operation in place on a view takes another tensor's place in the graph, and the hook is lost:
    gradients could be wrong without a word. To be called after ``fully_shard``.
    """
    # Newer versions of torch warn of every view; here it cannot happen any more.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    module.register_forward_hook(lambda module, args, output: map_leaves(output, _passed))


def _passed(value: Any) -> Any:
    if isinstance(value, Tensor) and value.requires_grad and value._base is not None:
        return _Passed.apply(value)  # type: ignore[no-untyped-call]
    return value


class _Passed(torch.autograd.Function):
    """The tensor itself; autograd refuses to change a view that was made in such a function."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
