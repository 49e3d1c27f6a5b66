"""Tensors of which each process holds a part: their norm, their parts, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

__all__ = ["local", "part_of", "reduced", "total_norm"]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reduced(gradient: Tensor) -> Tensor:
    """A gradient that is no longer a sum waiting to be made."""
    if isinstance(gradient, DTensor) and any(p.is_partial() for p in gradient.placements):
        return gradient.redistribute(
            placements=[Replicate() if p.is_partial() else p for p in gradient.placements]
        )
    return gradient


def total_norm(gradients: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of all gradients together, a plain tensor of shape () on ``device``.

    Gradients may be split over different meshes, as where a part of the model is divided and the
    rest is not; what several processes hold alike counts once. In 32-bit, or 64-bit where a
    gradient is.
    """
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        split: tuple[Any, ...] = ()
        if isinstance(gradient, DTensor):
            dims = [i for i, p in enumerate(gradient.placements) if not p.is_replicate()]
            split = (gradient.device_mesh, *dims)
        groups.setdefault(split, []).append(local(gradient))
    largest = norm_type == float("inf")
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    dtype = torch.float64 if wide else torch.float32
    total = torch.zeros((), dtype=dtype, device=device)
    for split, parts in groups.items():
        # A norm of nothing is not defined for every order.
        held = [part for part in parts if part.numel()]
        norm = nn.utils.get_total_norm(held, norm_type) if held else torch.zeros(())
        share = norm.to(device, dtype)
        if not largest:
            share = share**norm_type
        for dim in split[1:]:
            op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            dist.all_reduce(share, op, group=split[0].get_group(dim))
        total = torch.maximum(total, share) if largest else total + share
    return total if largest else total ** (1.0 / norm_type)


def part_of(value: Any, like: Any) -> Any:
    """A whole tensor, which every process has alike, split as ``like`` is.

    Everything that is no whole tensor for ``like`` is returned as it is.
    """
    if not isinstance(like, DTensor) or not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor) or value.shape != like.shape:
        return value
    whole = value.detach().to(like.device_mesh.device_type)
    # Nothing need be sent.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
