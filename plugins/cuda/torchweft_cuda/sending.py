"""Making tensors of all processes those of rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchweft_cuda.sharded import local

__all__ = ["brought", "send"]

#: Bytes that travel together, as in torch's own code.
_TOGETHER = 250 << 20

#: What every backend carries; others travel as bytes.
_CARRIED = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)


def send(tensors: Iterable[Tensor]) -> None:
    """The values of rank 0 to all processes, in place."""
    group: Any = dist.group.WORLD
    if dist.get_world_size() == 1:
        return
    # Of the data alone: what an earlier forward pass kept may still wait for its backward pass.
    sent = [_carried(local(tensor.detach()).data) for tensor in tensors]
    if sent:
        dist._broadcast_coalesced(group, sent, _TOGETHER, 0)  # type: ignore[attr-defined]


def _carried(tensor: Tensor) -> Tensor:
    if tensor.dtype in _CARRIED or not tensor.is_contiguous():
        return tensor
    return tensor.reshape(-1).view(torch.uint8)


@contextmanager
def brought(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Tensors on the device, with the values of rank 0; what has none yet stays as it is.

    Behind the block those that were elsewhere are there again, so that what was made of them is
    all that is on the device.
    """
    real = [tensor for tensor in tensors if not tensor.is_meta]
    elsewhere = [(tensor, tensor.data) for tensor in real if tensor.device != device]
    for tensor, data in elsewhere:
        tensor.data = data.to(device)
    try:
        send(real)
        yield
    finally:
        for tensor, data in elsewhere:
            tensor.data = data
