"""``deepspeed.checkpointing`` in the model: what is computed again is computed as at first."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch

from torchweft.api.initialising import default_dtype

__all__ = ["compute_alike"]


@cache  # DeepSpeed is imported once, for one kind of device.
def compute_alike(device: str) -> None:
    """Have DeepSpeed compute again under the autocast and in the default dtype of the first time.

    It brings back random numbers alone, so that in 16 bits a tensor that autocast converted at
    first would come to a layer in 32-bit. torch's own ``checkpoint`` sees to autocast by itself.
    """
    from deepspeed.runtime.activation_checkpointing import checkpointing

    plain, separate = checkpointing.CheckpointFunction, checkpointing.non_reentrant_checkpoint

    class Alike(plain):  # type: ignore[misc,valid-type]
        @staticmethod
        def forward(ctx: Any, function: Callable[..., Any], outputs: list[Any], *args: Any) -> Any:
            return plain.forward(ctx, _as_now(function, device), outputs, *args)

    @wraps(separate)
    def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
        return separate(_as_now(function, device), *args)

    # Looked up at each call, so that a ``checkpoint`` that was imported before finds it too.
    checkpointing.CheckpointFunction = Alike
    checkpointing.non_reentrant_checkpoint = non_reentrant_checkpoint


def _as_now(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    dtype = torch.get_default_dtype()
    enabled, low = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def run(*args: Any) -> Any:
        with default_dtype(dtype), torch.autocast(device, low, enabled=enabled):
            return function(*args)

    return run
