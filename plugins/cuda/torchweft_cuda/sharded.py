"""Tensors of which each process holds a part: their norm, their parts, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from torchweft.errors import IncompatiblePlan

__all__ = ["check_uneven", "local", "part_of", "total_norm"]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
        share = torch.zeros((), dtype=dtype, device=device)
        if held:
            norms = torch._foreach_norm(held, norm_type, dtype=dtype)
            share = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), norm_type)
        if not largest:
            share = share**norm_type
        for dim in split[1:]:
            op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            dist.all_reduce(share, op, group=split[0].get_group(dim))
        total = torch.maximum(total, share) if largest else total + share
    return total if largest else total ** (1.0 / norm_type)


@torch.no_grad()
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
    part = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    if local(part).device == local(like).device:
        held = local(part)
        # Older versions of torch return a view, which would keep the whole.
        shared = held.untyped_storage().nbytes() > held.numel() * held.element_size()
        return part.clone() if shared else part
    # What is kept on the host is on no device of the mesh, where a DTensor is otherwise made.
    moved = torch.empty_like(like, dtype=whole.dtype)
    local(moved).copy_(local(part))
    return moved


# -- what is split twice along one dimension -------------------------------------------------------


def check_uneven(module: nn.Module) -> None:
    """Whether this torch puts parameters together as it takes them apart.

    Older ones do not where a dimension is split by layers and again by parts, and does not divide:
    a checkpoint would silently be wrong. Every process of the run has to call it.

    Raises ``IncompatiblePlan``.
    """
    seen = set()
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        placements: Any = parameter.placements
        split = [placement.dim for placement in placements if not placement.is_replicate()]
        for dim in {each for each in split if split.count(each) > 1}:
            length, mesh = parameter.shape[dim], parameter.device_mesh
            pieces = 1
            for i, placement in enumerate(placements):
                pieces *= mesh.size(i) if _splits(placement, dim) else 1
            case = (length, dim, placements)
            if length % pieces == 0 or case in seen:
                continue
            seen.add(case)
            if not _is_put_together(length, parameter, dim):
                raise IncompatiblePlan(
                    f"'{name}', of shape {tuple(parameter.shape)}, is split into {pieces} parts "
                    f"along dimension {dim}, by tensor= and again by shard=, which do not divide "
                    f"{length}; torch {torch.__version__} puts such parts together in a wrong "
                    f"order: make it a multiple of {pieces}, leave that module out of the plan for "
                    "tensor parallelism, or upgrade torch (2.13 is right)"
                )


def _splits(placement: Any, dim: int) -> bool:
    return not placement.is_replicate() and placement.dim == dim


def _is_put_together(length: int, like: DTensor, dim: int) -> bool:
    """Tried on the numbers of the rows, in all processes."""
    mesh = like.device_mesh
    numbers = torch.arange(length, device=mesh.device_type)
    mine = numbers
    placements = [_along_first(p) if _splits(p, dim) else Replicate() for p in like.placements]
    # Layers are divided first, by the last dimension of the mesh.
    for i, placement in reversed(list(enumerate(like.placements))):
        if _splits(placement, dim):
            pieces = mine.chunk(mesh.size(i))
            here = mesh.get_local_rank(i)
            mine = pieces[here] if here < len(pieces) else mine[:0]
    tried = distribute_tensor(numbers, mesh, placements, src_data_rank=None)
    if not _all(torch.equal(tried.to_local(), mine), mesh.device_type):
        return False
    return _all(torch.equal(tried.full_tensor(), numbers), mesh.device_type)


def _all(answer: bool, device: str) -> bool:
    """Whether it is so in all processes."""
    told = torch.tensor(int(answer), device=device)
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return bool(told)


def _along_first(placement: Any) -> Any:
    factor = getattr(placement, "split_factor", None)
    return type(placement)(0) if factor is None else type(placement)(0, split_factor=factor)
