"""Communication between the processes of a run, on single tensors and Python objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchweft.errors import InvalidRequest

__all__ = ["Alone", "Collectives", "ProcessGroup"]

_OPS = ("mean", "sum", "min", "max", "product")


def check_op(op: str) -> None:
    """Raise ``InvalidRequest`` for a reduction that is not one of the five."""
    if op not in _OPS:
        raise InvalidRequest(f"reduce_op='{op}' is not known; it takes one of {', '.join(_OPS)}")


class Collectives(ABC):
    """What every strategy offers between the processes that run the user's script.

    Every method but the properties must be called by all processes, in the same order.
    """

    @abstractmethod
    def broadcast(self, value: Any, src: int = 0) -> Any:
        """The ``value`` of rank ``src``, a tensor or any object that can be pickled."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: str = "mean", group: Any = None) -> Tensor:
        """A new tensor of the same shape: ``"mean"``, ``"sum"``, ``"min"``, ``"max"`` or
        ``"product"`` over all processes. Integers stay integers except under ``"mean"``."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """All processes' tensors of one shape, stacked: shape ``(processes, *tensor.shape)``.

        With ``sync_grads`` gradients flow back to the process that each part came from.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Return when every process has called it."""


class Alone(Collectives):
    """The collectives of a single process."""

    def broadcast(self, value: Any, src: int = 0) -> Any:
        _check_src(src, 1)
        return value

    def all_reduce(self, tensor: Tensor, op: str = "mean", group: Any = None) -> Tensor:
        check_op(op)
        if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor.to(torch.get_default_dtype())
        return tensor.clone()

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        gathered = tensor.unsqueeze(0)
        return gathered if sync_grads else gathered.detach().clone()

    def barrier(self) -> None:
        pass


class ProcessGroup(Collectives):
    """Collectives over ``torch.distributed``'s default process group.

    ``device`` is where the group's backend works (``"cuda"`` for nccl); tensors elsewhere are
    moved there and back.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def broadcast(self, value: Any, src: int = 0) -> Any:
        _check_src(src, dist.get_world_size())
        # Objects and tensors share one route: the other ranks do not know what is coming. Tensors
        # travel without gradient, as any pickled value does.
        box = [value if dist.get_rank() == src else None]
        dist.broadcast_object_list(box, src=src, device=self._device)
        received = box[0]
        if isinstance(received, Tensor) and isinstance(value, Tensor):
            return received.to(value.device)
        return received

    def all_reduce(self, tensor: Tensor, op: str = "mean", group: Any = None) -> Tensor:
        check_op(op)
        work = tensor.detach().clone().to(self._device)
        if op == "mean":
            if not (work.is_floating_point() or work.is_complex()):
                work = work.to(torch.get_default_dtype())
            # gloo has no mean; dividing after the sum gives the same on every backend.
            dist.all_reduce(work, op=dist.ReduceOp.SUM, group=group)
            work = work / dist.get_world_size(group)
        else:
            dist.all_reduce(work, op=getattr(dist.ReduceOp, op.upper()), group=group)
        return work.to(tensor.device)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        work = tensor.to(self._device).contiguous()
        if sync_grads:
            from torch.distributed.nn import functional

            world = group if group is not None else dist.group.WORLD
            parts = functional.all_gather(work, group=world)  # type: ignore[no-untyped-call]
        else:
            work = work.detach()
            parts = [torch.empty_like(work) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, work, group=group)
        return torch.stack(tuple(parts)).to(tensor.device)

    def barrier(self) -> None:
        # nccl warns unless it is told the device, gloo refuses to be told. A reduction of one
        # number is a barrier on every backend, once its result has been read.
        token = torch.zeros(1, device=self._device)
        dist.all_reduce(token)
        token.item()


def _check_src(src: int, world_size: int) -> None:
    if not 0 <= src < world_size:
        raise InvalidRequest(
            f"broadcast from src={src}, but the ranks of this run are 0 to {world_size - 1}"
        )

