"""What ranks exchange, and what each must have received by the definition of each collective."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchweft.fabric import Fabric

__all__ = ["DTYPES", "OPS", "Thing", "exchange", "nested", "objects", "share", "tensor_of"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
OPS = ("mean", "sum", "min", "max", "product")


@dataclass(frozen=True)
class Thing:
    """An object of a class that no library knows."""

    name: str
    values: tuple[int, ...]


def tensor_of(rank: int, dtype: torch.dtype) -> Tensor:
    """Shape ``(2, 3)``; what rank ``rank`` has, small enough for every dtype and operation."""
    values = torch.arange(6).reshape(2, 3) % 4 + rank
    return (values % 2 == 0) if dtype == torch.bool else values.to(dtype)


def nested(rank: int) -> Any:
    """Tensors and numbers in collections."""
    return {
        "loss": torch.tensor(float(rank + 1)),
        "parts": [tensor_of(rank, torch.float32), (rank, 0.5 * rank)],
        "empty": [],
    }


@dataclass(kw_only=True)
class Exchanged:
    """What a rank received; ``unsupported``: dtypes that its device does not know, and why."""

    reduced: dict[tuple[str, str], Tensor]
    gathered: dict[str, Tensor]
    broadcast: dict[tuple[str, int], Tensor]
    unsupported: dict[str, str]


def exchange(fabric: Fabric) -> Exchanged:
    """Reduce, gather and broadcast a tensor of every dtype."""
    told = Exchanged(reduced={}, gathered={}, broadcast={}, unsupported={})
    rank = fabric.global_rank
    for name, dtype in DTYPES.items():
        try:
            mine = tensor_of(rank, dtype).to(fabric.device)
        except (TypeError, RuntimeError) as error:
            told.unsupported[name] = str(error)
            continue
        for op in OPS:
            told.reduced[name, op] = fabric.all_reduce(mine.clone(), reduce_op=op)
        told.gathered[name] = fabric.all_gather(mine, stack=True)
        for src in range(fabric.world_size):
            told.broadcast[name, src] = fabric.broadcast(mine, src=src)
    return told


def share(fabric: Fabric) -> dict[str, Any]:
    """Nested data, objects, gradients through a gathering, and a barrier."""
    rank, size = fabric.global_rank, fabric.world_size
    last = size - 1
    told: dict[str, Any] = {
        "reduced": fabric.all_reduce(fabric.to_device(nested(rank)), reduce_op="sum"),
        "gathered": fabric.all_gather(fabric.to_device(nested(rank)), stack=True),
        "objects": fabric.broadcast(objects(rank), src=last),
        "large": len(fabric.broadcast(b"x" * (1 << 20) if rank == 0 else None)),
        "nothing": fabric.broadcast(None if rank == 0 else "something"),
    }
    leaf = torch.full((3,), float(rank + 1), device=fabric.device, requires_grad=True)
    gathered = fabric.all_gather(leaf, sync_grads=True, stack=True)
    weights = torch.arange(1.0, 1 + gathered.numel(), device=fabric.device).reshape(gathered.shape)
    (gathered * weights * (rank + 1)).sum().backward()
    told["gradient"] = leaf.grad
    # The last rank comes late; nobody may pass before it.
    if rank == last:
        time.sleep(0.3)
    arrived = time.monotonic()
    fabric.barrier()
    told["arrived"], told["passed"] = arrived, time.monotonic()
    return told


def objects(rank: int) -> list[Any]:
    """What rank ``rank`` broadcasts."""
    return [Thing(f"of rank {rank}", (rank, 2)), {"set": {1, rank}}, nested(rank), "text", None]
