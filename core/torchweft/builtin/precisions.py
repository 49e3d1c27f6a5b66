"""The precisions that need nothing but torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from torchweft.api import Precision, map_leaves
from torchweft.api.strategy import default_dtype

__all__ = ["BFloat16", "BFloat16Mixed", "Double", "Full", "Half", "Mixed"]


class Full(Precision):
    """32-bit throughout, as plain PyTorch."""


class _True(Precision):
    """Parameters, inputs and computation in one dtype; outputs come back in torch's default."""

    dtype: torch.dtype

    def __init__(self) -> None:
        self.init_dtype = self.dtype

    def convert_module(self, module: nn.Module) -> nn.Module:
        """All floating-point parameters and buffers, in place."""
        return module.to(dtype=self.dtype)

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to the precision's dtype."""
        return _convert(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return _convert(data, torch.get_default_dtype())

    def forward_context(self) -> AbstractContextManager[Any]:
        """Tensors made inside ``forward`` have the precision's dtype too."""
        return default_dtype(self.dtype)


class Double(_True):
    """64-bit throughout, outputs and so the loss too: narrowing them would undo it."""

    dtype = torch.float64
    convert_output = Precision.convert_output


class BFloat16(_True):
    """bfloat16 throughout, parameters too."""

    dtype = torch.bfloat16


class Half(_True):
    """float16 throughout, parameters too; small gradients vanish, so mind the learning rate."""

    dtype = torch.float16


class Mixed(Precision):
    """Parameters in 32-bit; torch's autocast chooses where computation runs in ``dtype``."""

    dtype: torch.dtype

    def start(self, device: torch.device) -> None:
        """Prepare the context once, since making one costs several times entering it."""
        super().start(device)
        self._context = self._new_context()
        self._busy = False

    def _new_context(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype, so that a loss is computed in it."""
        return _convert(data, torch.get_default_dtype())

    def forward_context(self) -> AbstractContextManager[Any]:
        """An autocast region; it may be entered inside another one."""
        return _Reused(self)


class _Reused:
    """Enters the one prepared autocast context, or a new one where that is already entered."""

    __slots__ = ("_context", "_owner")

    def __init__(self, owner: Mixed) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        owner = self._owner
        if owner._busy:
            self._context = owner._new_context()
        else:
            owner._busy = True
            self._context = owner._context
        self._context.__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self._context is self._owner._context:
            self._owner._busy = False
        self._context.__exit__(*exc)


class BFloat16Mixed(Mixed):
    """Parameters in 32-bit, computation in bfloat16 where torch's autocast deems it safe."""

    dtype = torch.bfloat16


def _convert(data: Any, dtype: torch.dtype) -> Any:
    if type(data) is Tensor:  # the common case, without a walk
        return data.to(dtype) if data.is_floating_point() else data

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.to(dtype)
        return leaf

    return map_leaves(data, convert)
