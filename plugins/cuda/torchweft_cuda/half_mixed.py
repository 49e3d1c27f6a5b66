"""Mixed float16 with a loss scaler."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchweft.api import Autocast
from torchweft.errors import IncompatiblePlan, Misuse

__all__ = ["HalfMixed"]


class HalfMixed(Autocast):
    """Parameters in 32-bit, computation in float16 under autocast, gradients scaled.

    Mixed precision training: Micikevicius et al., 2018 (arXiv:1710.03740), with the dynamic loss
    scale of ``torch.amp.GradScaler``. A step whose gradients overflowed is skipped, and the scale
    is multiplied by ``backoff_factor``.

    With several optimizers, overflow is a matter of each one's own gradients: one may be skipped
    and another not. They share one scale, which changes at the first ``backward`` after a step and
    not between the steps of two optimizers whose gradients came from the same scale. Gradients
    that were accumulated for one optimizer while another one stepped may be off by a factor of
    ``growth_factor`` or ``backoff_factor``.

    Args:
        init_scale: the first loss scale.
        growth_factor: by which the scale grows after ``growth_interval`` good steps.
        backoff_factor: by which it shrinks after an overflow.
        growth_interval: steps without overflow before it grows.
    """

    dtype = torch.float16
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
        self.scaler = self.make_scaler(device)
        self._stepped = False
        self._backwards = 0
        # By optimizer whose gradients are true at present: at which backward they became so.
        self._true: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def make_scaler(self, device: torch.device) -> Any:
        """torch's own scaler for a kind of device, with the options given."""
        return torch.amp.GradScaler(device.type, **self._options)  # type: ignore[arg-type]

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the current scale."""
        self._settle()
        self._backwards += 1
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, unless they have been divided since the last step.

        Raises ``Misuse`` where a ``backward`` in between may have added scaled ones to them.
        """
        since = self._true.get(optimizer)
        if since is None:
            if _has_gradients(optimizer):
                self.scaler.unscale_(optimizer)
                self._true[optimizer] = self._backwards
        elif since != self._backwards:
            raise Misuse(
                "fabric.clip_gradients() was called again before optimizer.step(), with "
                "fabric.backward() in between, which adds scaled gradients to those that were "
                "unscaled for clipping; clip once, after the last fabric.backward() and right "
                "before optimizer.step(), or leave the step out by optimizer.zero_grad()"
            )

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step unless a gradient overflowed; the scale follows at the next ``scale``."""
        if closure is not None:
            raise IncompatiblePlan(
                "precision '16-mixed' scales the loss and may skip a step, which an optimizer "
                "that calls a closure does not allow; use precision='bf16-mixed' or '32-true'"
            )
        if not _has_gradients(optimizer):
            # Nothing to look for an overflow in, which the scaler takes for a mistake.
            return optimizer.step()
        result = self.scaler.step(optimizer)
        self._true.pop(optimizer, None)
        self._stepped = True
        # A skipped step is a step to torch's learning rate schedulers, which otherwise warn that
        # they came first.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return result

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        """Forget gradients; a step that is left out after clipping counts for the scale."""
        if self._true.pop(optimizer, None) is not None:
            self._stepped = True
        optimizer.zero_grad(set_to_none)

    def _settle(self) -> None:
        """Let the scale follow the steps that were made with it."""
        # Not in step: with several optimizers, the next one's gradients are still those of this
        # scale, and what the scaler knows about them would be lost.
        if self._stepped and not self._true:
            self._stepped = False
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The scale and its counters."""
        self._settle()
        state: dict[str, Any] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scale and its counters; those of another precision, none, change nothing."""
        self._settle()
        if state:
            self.scaler.load_state_dict(state)


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
