"""The precisions that need nothing but torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from torchweft.api import Precision
from torchweft.api.initialising import default_dtype
from torchweft.api.precision import Autocast, convert_floats

__all__ = ["BFloat16", "BFloat16Mixed", "Double", "Full", "Half"]


class Full(Precision):
    """32-bit throughout, as plain PyTorch."""


class _True(Precision):
    """Parameters, inputs, computation and outputs in one dtype."""

    dtype: torch.dtype

    def __init__(self) -> None:
        self.init_dtype = self.dtype

    def convert_module(self, module: nn.Module) -> nn.Module:
        """All floating-point parameters and buffers, in place."""
        return module.to(dtype=self.dtype)

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to the precision's dtype."""
        return convert_floats(data, self.dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Tensors made inside ``forward`` have the precision's dtype too."""
        return default_dtype(self.dtype)


class _TrueHalf(_True):
    """The same, but for outputs, which come back in torch's default dtype for the loss."""

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return convert_floats(data, torch.get_default_dtype())


class Double(_True):
    """64-bit throughout, outputs too: a loss in 32-bit would be all the accuracy that is left."""

    dtype = torch.float64


class BFloat16(_TrueHalf):
    """bfloat16 throughout, parameters too."""

    dtype = torch.bfloat16


class Half(_TrueHalf):
    """float16 throughout, parameters too; small gradients vanish, so mind the learning rate."""

    dtype = torch.float16


class BFloat16Mixed(Autocast):
    """Parameters in 32-bit, computation in bfloat16 where torch's autocast deems it safe."""

    dtype = torch.bfloat16
