"""The base class of precisions: which number formats parameters and computation use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.api.batch import map_leaves

__all__ = ["Autocast", "Precision", "convert_floats"]


class Precision:
    """Does nothing by default, which is 32-bit.

    A complete precision, declared by
    ``PrecisionSpec(name="32-medium", target="my_package.medium:Medium")``::

        class Medium(Precision):
            def start(self, device):
                super().start(device)
                torch.set_float32_matmul_precision("medium")

    ``setup`` looks once at which of ``convert_input``, ``convert_output`` and ``forward_context``
    a class overrides; what is not overridden costs nothing per step.
    """

    #: Whether a loss must pass through ``fabric.backward`` for the step to be right.
    scales_loss: ClassVar[bool] = False

    #: dtype in which parameters are created under ``fabric.init_module()``; None: torch's default.
    init_dtype: torch.dtype | None = None

    #: torch's word for the device of this process, by ``start``.
    device_type: str = "cpu"

    def start(self, device: torch.device) -> None:
        """Called once in every process, when the device is known and before any ``setup``."""
        self.device_type = device.type

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert parameters and buffers, in place where torch does."""
        return module

    def convert_input(self, data: Any) -> Any:
        """Convert floating-point tensors on their way into ``forward`` (nested collections)."""
        return data

    def convert_output(self, data: Any) -> Any:
        """Convert floating-point tensors on their way out of ``forward``."""
        return data

    def forward_context(self) -> AbstractContextManager[Any]:
        """What surrounds ``forward``; also what ``fabric.autocast()`` returns."""
        return nullcontext()

    def scale(self, loss: Tensor) -> Tensor:
        """The tensor on which ``backward`` is called."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """Make the gradients of ``optimizer`` the true ones, in place.

        Called before clipping, so perhaps more than once before a step; true gradients stay.
        """

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step, or skip the step where gradients overflowed; returns what the optimizer returns."""
        return optimizer.step() if closure is None else optimizer.step(closure)

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        """Forget gradients, perhaps without a step since they were computed."""
        optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next step to be the same; plain values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


class Autocast(Precision):
    """Parameters in 32-bit; torch's autocast runs in ``dtype`` what it deems safe.

    Outputs come back in torch's default dtype, so that a loss is computed in it.
    """

    #: What computation runs in.
    dtype: torch.dtype

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        dtype = torch.get_default_dtype()
        if type(data) is Tensor:  # the common case, without another call
            return data.to(dtype) if data.is_floating_point() else data
        return convert_floats(data, dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        """An autocast region; it may be entered inside another one, and in any thread."""
        # Made anew each time: entering costs more than making one, and one that is shared would
        # mix up what it restores on the way out when it is entered twice at a time.
        return torch.autocast(self.device_type, dtype=self.dtype)


def convert_floats(data: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in nested collections as ``dtype``; everything else is kept."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.to(dtype)
        return leaf

    return map_leaves(data, convert)
