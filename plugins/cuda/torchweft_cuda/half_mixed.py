"""Mixed float16 with a loss scaler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchweft.api import Precision, map_leaves
from torchweft.errors import IncompatiblePlan

__all__ = ["HalfMixed"]


class HalfMixed(Precision):
    """Parameters in 32-bit, computation in float16 under autocast, gradients scaled.

    Mixed precision training: Micikevicius et al., 2018 (arXiv:1710.03740), with the dynamic loss
    scale of ``torch.amp.GradScaler``. A step whose gradients overflowed is skipped and the scale
    halved.

    Args:
        init_scale: the first loss scale.
        growth_factor: by which the scale grows after ``growth_interval`` good steps.
        backoff_factor: by which it shrinks after an overflow.
        growth_interval: steps without overflow before it grows.
    """

    scales_loss = True

    def __init__(
        self,
        *,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self._options = {
            "init_scale": init_scale,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
        }

    def start(self, device: torch.device) -> None:
        """Make the scaler for the device."""
        super().start(device)
        self.scaler = torch.amp.GradScaler(device.type, **self._options)  # type: ignore[arg-type]

    def forward_context(self) -> AbstractContextManager[Any]:
        """An autocast region."""
        return torch.autocast(self.device_type, dtype=torch.float16)

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype, so that a loss is computed in it."""

        def convert(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf.to(torch.get_default_dtype())
            return leaf

        return map_leaves(data, convert)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the current scale."""
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, once per step."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step unless a gradient overflowed, then update the scale."""
        if closure is not None:
            raise IncompatiblePlan(
                "precision '16-mixed' scales the loss and may skip a step, which an optimizer "
                "that calls a closure does not allow; use precision='bf16-mixed' or '32-true'"
            )
        result = self.scaler.step(optimizer)
        self.scaler.update()
        return result

    def state_dict(self) -> dict[str, Any]:
        """The scale and its counters."""
        state: dict[str, Any] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scale and its counters."""
        self.scaler.load_state_dict(state)
