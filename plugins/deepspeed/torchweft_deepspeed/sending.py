"""The tensors of rank 0 in all processes, where DeepSpeed leaves each its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["send", "send_buffers_before"]

_TOGETHER = 250 * 1024 * 1024  # bytes of tensors that are sent at a time, as torch has it


def send(tensors: Iterable[Tensor]) -> None:
    """Those of rank 0 to all, in place."""
    sent = [tensor.detach() for tensor in tensors]
    if sent and dist.get_world_size() > 1:
        group: Any = dist.group.WORLD
        dist._broadcast_coalesced(group, sent, _TOGETHER, 0)  # type: ignore[attr-defined]


def send_buffers_before(called: nn.Module, module: nn.Module) -> None:
    """Send the buffers of ``module``, if it has any, whenever ``called`` is."""
    # The modules are looked for once; their buffers may be replaced at any time.
    owners = [each for each in module.modules() if each._buffers]

    def send_now(*_: Any) -> None:
        found = [buffer for each in owners for buffer in each._buffers.values()]
        send(buffer for buffer in found if buffer is not None)

    if owners and dist.get_world_size() > 1:
        called.register_forward_pre_hook(send_now)
