"""DeepSpeed's number formats, each a block of its configuration.

DeepSpeed keeps a copy of the parameters in 32-bit for the optimizer wherever the model has 16 bits,
scales the loss by itself and skips the steps whose gradients overflowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from torchweft.api import Place, Precision
from torchweft.api.initialising import default_dtype
from torchweft.api.precision import convert_floats
from torchweft.errors import IncompatiblePlan

__all__ = [
    "BFloat16",
    "BFloat16Mixed",
    "DeepSpeedPrecision",
    "Full",
    "Half",
    "HalfMixed",
    "precision_of",
]


class DeepSpeedPrecision(Precision):
    """A dtype of the parameters and a block of configuration, which the strategy reads."""

    #: In which the parameters are computed with; None: as they are.
    dtype: ClassVar[torch.dtype | None] = None

    #: Of DeepSpeed's configuration.
    block: str = ""

    def config(self) -> dict[str, Any]:
        """The blocks of DeepSpeed's configuration."""
        return {}

    def enter(self, module: nn.Module) -> None:
        """Prepare a module whose ``forward`` DeepSpeed's engine surrounds."""


class Full(DeepSpeedPrecision):
    """32-bit throughout."""


class _Low(DeepSpeedPrecision):
    """Inputs in 16 bits, outputs in torch's default dtype, so that a loss is computed in it."""

    dtype: ClassVar[torch.dtype]

    #: Whether buffers, and tensors that are made in ``forward``, have 16 bits too.
    whole: ClassVar[bool] = False

    def __init__(self) -> None:
        self.options: Mapping[str, Any] = {}
        if self.whole:
            self.init_dtype = self.dtype

    def config(self) -> dict[str, Any]:
        """One block, enabled, with its options."""
        return {self.block: {"enabled": True, **self.options}}

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Buffers too, where all is in 16 bits; the parameters are left to DeepSpeed otherwise."""

        def convert(tensor: Tensor) -> Tensor:
            # What DeepSpeed made and divided at once has its dtype.
            made = hasattr(tensor, "ds_id") or not tensor.is_floating_point()
            return tensor if made else tensor.to(self.dtype)

        if self.whole:
            module._apply(convert)  # type: ignore[no-untyped-call]
        else:
            # torch wants running statistics in the dtype of the parameters beside them.
            for norm in (each for each in module.modules() if isinstance(each, _NormBase)):
                for buffer in norm.buffers(recurse=False):
                    buffer.data = convert(buffer.data)
        return module

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to 16 bits."""
        return convert_floats(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return convert_floats(data, torch.get_default_dtype())

    def forward_context(self) -> AbstractContextManager[Any]:
        """Tensors made inside ``forward`` have 16 bits, where all has; autocast elsewhere."""
        if self.whole:
            return default_dtype(self.dtype)
        return torch.autocast(self.device_type, dtype=self.dtype)

    def enter(self, module: nn.Module) -> None:
        """Autocast, for what meets a tensor of 32 bits; DeepSpeed leaves the one around it."""
        if self.whole:
            return
        entered: list[Any] = []

        def begin(*_: Any) -> None:
            entered.append(torch.autocast(self.device_type, dtype=self.dtype))
            entered[-1].__enter__()

        def end(*_: Any) -> None:
            entered.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end, always_call=True)


class BFloat16Mixed(_Low):
    """Parameters in 32-bit, computed with in bfloat16: DeepSpeed's block ``bf16``.

    Args:
        check_grad_overflow: leave out a step whose gradients are not finite.
    """

    dtype = torch.bfloat16
    block = "bf16"

    def __init__(self, *, check_grad_overflow: bool = True) -> None:
        super().__init__()
        self.options = {"check_grad_overflow": check_grad_overflow}


class BFloat16(BFloat16Mixed):
    """Parameters, buffers and computation in bfloat16: DeepSpeed's block ``bf16``.

    Args:
        check_grad_overflow: leave out a step whose gradients are not finite.
        bf16_master_weights_and_grads: step in bfloat16 too, at stages 1 to 3.
        bf16_optimizer_states: keep the optimizer's state in bfloat16 too.
    """

    whole = True

    def __init__(
        self,
        *,
        check_grad_overflow: bool = True,
        bf16_master_weights_and_grads: bool = False,
        bf16_optimizer_states: bool = False,
    ) -> None:
        super().__init__(check_grad_overflow=check_grad_overflow)
        self.options = {
            **self.options,
            "bf16_master_weights_and_grads": bf16_master_weights_and_grads,
            "bf16_optimizer_states": bf16_optimizer_states,
        }


class HalfMixed(_Low):
    """Parameters in 32-bit, computed with in float16: DeepSpeed's block ``fp16``.

    Args:
        loss_scale: a scale that stays; 0: one that follows overflows.
        initial_scale_power: the first scale is two to that power.
        loss_scale_window: steps without overflow before the scale is doubled.
        hysteresis: overflows before the scale is halved.
        consecutive_hysteresis: whether a step without overflow starts that count again.
        min_loss_scale: below which the scale does not go.
    """

    dtype = torch.float16
    block = "fp16"
    scales_loss = True

    def __init__(
        self,
        *,
        loss_scale: float = 0.0,
        initial_scale_power: int = 16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        consecutive_hysteresis: bool = False,
        min_loss_scale: int = 1,
    ) -> None:
        super().__init__()
        self.options = {
            "loss_scale": loss_scale,
            "initial_scale_power": initial_scale_power,
            "loss_scale_window": loss_scale_window,
            "hysteresis": hysteresis,
            "consecutive_hysteresis": consecutive_hysteresis,
            "min_loss_scale": min_loss_scale,
        }


class Half(HalfMixed):
    """Parameters, buffers and computation in float16; options are those of ``16-mixed``."""

    whole = True


def precision_of(place: Place) -> DeepSpeedPrecision:
    """The one that was chosen. Raises ``IncompatiblePlan`` where the device has no such one."""
    precision, name = place.precision, place.plan.precision.name
    if not isinstance(precision, DeepSpeedPrecision):
        raise IncompatiblePlan(
            f"precision '{name}' is a {type(precision).__name__}, and strategy 'deepspeed' takes "
            "its own alone: 32-true, bf16-true, bf16-mixed, 16-true, 16-mixed"
        )
    from deepspeed.accelerator import get_accelerator

    here = get_accelerator()
    supported = {torch.float16: here.is_fp16_supported, torch.bfloat16: here.is_bf16_supported}
    if precision.dtype in supported and not supported[precision.dtype]():
        # The words of DeepSpeed.
        word = "fp16" if precision.dtype == torch.float16 else "bf16"
        raise IncompatiblePlan(
            f"precision '{name}' cannot be used with strategy 'deepspeed' on "
            f"'{place.device.type}': DeepSpeed says that type {word} is not supported on your "
            "device; use precision='bf16-mixed' or '32-true'"
        )
    return precision
