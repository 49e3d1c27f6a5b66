"""Mixed precision where parameters are sharded: they are gathered in 16 bits already."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from torchweft.api import Autocast
from torchweft_cuda.half_mixed import HalfMixed
from torchweft_cuda.sharded import local

__all__ = ["ShardedBFloat16Mixed", "ShardedHalfMixed", "ShardedMixed"]


class ShardedMixed(Autocast):
    """Parameters are held in 32-bit, and gathered and computed with in ``dtype``.

    That is ``torch.distributed.fsdp.MixedPrecisionPolicy``, so that what travels is half as large.
    Gradients are reduced in 32-bit. Autocast is on as elsewhere, for what meets a tensor of 32
    bits inside of the model; outputs come back in torch's default dtype, so that a loss is
    computed in it.
    """


class ShardedBFloat16Mixed(ShardedMixed):
    """Parameters in 32-bit, computation in bfloat16."""

    dtype = torch.bfloat16


class ShardedHalfMixed(ShardedMixed, HalfMixed):
    """Parameters in 32-bit, computation in float16, gradients scaled.

    A step is skipped in all processes where a gradient of any overflowed. Options are those of
    ``16-mixed`` elsewhere.
    """

    dtype = torch.float16

    def make_scaler(self, device: torch.device) -> Any:
        """One that asks the other processes."""
        return _Scaler(device.type, **self._options)  # type: ignore[arg-type]


class _Scaler(torch.amp.GradScaler):
    """Unscales what this process holds, and hears of overflows in other processes."""

    @torch.no_grad()
    def _unscale_grads_(
        self,
        optimizer: Optimizer,
        inv_scale: torch.Tensor,
        found_inf: torch.Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, torch.Tensor]:
        by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    held = local(parameter.grad)
                    by_kind.setdefault((held.device, held.dtype), []).append(held)
        overflowed = found_inf.clone()
        for (device, _), grads in by_kind.items():
            found = torch.zeros_like(found_inf, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inv_scale.to(device))
            overflowed = torch.maximum(overflowed, found.to(overflowed.device))
        dist.all_reduce(overflowed, dist.ReduceOp.MAX)
        return {overflowed.device: overflowed}
