"""Communication between the processes of a run, on single tensors and Python objects."""

from __future__ import annotations

import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
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
        """The ``value`` of rank ``src``, a tensor or any object that can be pickled.

        Tensors, also inside of objects, arrive without gradient, on the same kind of device as
        they were on, and there on the one of the process that receives them.
        """

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: str = "mean", group: Any = None) -> Tensor:
        """A new tensor of the same shape: ``"mean"``, ``"sum"``, ``"min"``, ``"max"`` or
        ``"product"`` over all processes. Integers stay integers except under ``"mean"``, and
        booleans booleans except under ``"mean"`` and ``"sum"``, which counts."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """All processes' tensors of one shape, stacked: shape ``(processes, *tensor.shape)``.

        With ``sync_grads`` gradients flow back to the process that each part came from, those of
        all processes summed.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Return when every process has called it."""

    def begin_any(self, flag: bool) -> Callable[[], bool]:
        """Begin to find out whether ``flag`` is true in any process.

        The function that comes back waits for the answer, the same in all processes. Overridden
        where it need not be waited for in between.
        """
        token = torch.tensor(float(flag))
        answer = bool(self.all_reduce(token, "max").item())
        return lambda: answer


class Alone(Collectives):
    """The collectives of a single process."""

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """The value itself."""
        _check_src(src, 1)
        return value

    def all_reduce(self, tensor: Tensor, op: str = "mean", group: Any = None) -> Tensor:
        """A copy, with the dtype that the reduction would have between several processes."""
        check_op(op)
        work = _before_reduction(tensor.detach().clone(), op)
        return _after_reduction(work, tensor, op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Shape ``(1, *tensor.shape)``."""
        gathered = tensor.unsqueeze(0)
        return gathered if sync_grads else gathered.detach().clone()

    def barrier(self) -> None:
        """Nobody to wait for."""


class ProcessGroup(Collectives):
    """Collectives over ``torch.distributed``'s default process group.

    ``device`` is where the group's backend works (``"cuda"`` for nccl); tensors elsewhere are
    moved there and back.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_host: Any = None

    def begin_any(self, flag: bool) -> Callable[[], bool]:
        """Between the hosts' memories, in a group of its own: no device is waited for."""
        if self._on_host is None:
            self._on_host = dist.new_group(backend="gloo")
        token = torch.tensor([flag], dtype=torch.uint8)
        work = dist.all_reduce(token, dist.ReduceOp.MAX, group=self._on_host, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(token.item())

        return answer

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """The ``value`` of rank ``src``; a plain tensor is sent without being pickled."""
        _check_src(src, dist.get_world_size())
        mine = dist.get_rank() == src
        # The other ranks do not know what is coming. A plain tensor is announced and sent as it
        # is, everything else is pickled.
        plain = mine and type(value) in (Tensor, torch.nn.Parameter) and _is_plain(value)
        announced = self._broadcast_pickled(_Announced.of(value) if plain else value, src)
        if not isinstance(announced, _Announced):
            return value if mine else announced
        if mine:
            self._send(value.detach(), src)
            return value
        return announced.receive(self._device, src)

    def _send(self, tensor: Tensor, src: int) -> None:
        dist.broadcast(_bytes_of(tensor.to(self._device)), src=src)

    def _broadcast_pickled(self, value: Any, src: int) -> Any:
        mine = dist.get_rank() == src
        content = _pickled(value) if mine else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([content.numel()], device=self._device)
        dist.broadcast(size, src=src)
        if mine:
            dist.broadcast(content.to(self._device), src=src)
            return value
        buffer = torch.empty(int(size.item()), dtype=torch.uint8, device=self._device)
        dist.broadcast(buffer, src=src)
        return pickle.loads(buffer.cpu().numpy().tobytes())

    def all_reduce(self, tensor: Tensor, op: str = "mean", group: Any = None) -> Tensor:
        """Reduced over the group, on the device that ``tensor`` is on."""
        check_op(op)
        work = tensor.detach().contiguous().to(self._device, copy=True)
        work = _before_reduction(work, op)
        if op == "mean":
            # gloo has no mean; dividing after the sum gives the same on every backend.
            dist.all_reduce(work, op=dist.ReduceOp.SUM, group=group)
            work = work / dist.get_world_size(group)
        else:
            dist.all_reduce(work, op=getattr(dist.ReduceOp, op.upper()), group=group)
        return _after_reduction(work, tensor, op).to(tensor.device)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Stacked over the group, on the device that ``tensor`` is on."""
        work = tensor.to(self._device)
        if sync_grads:
            gathered: Tensor = _Gather.apply(work, group)  # type: ignore[no-untyped-call]
        else:
            gathered = _gather(work.detach(), group)
        return gathered.to(tensor.device)

    def barrier(self) -> None:
        """Return when every process of the default group has called it."""
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


# -- what backends cannot carry as it is -----------------------------------------------------------


def _before_reduction(tensor: Tensor, op: str) -> Tensor:
    if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.to(torch.get_default_dtype())
    if tensor.dtype in (torch.bool, torch.int16):  # gloo takes booleans for bytes, int16 not at all
        return tensor.to(torch.int64)
    return tensor


def _after_reduction(work: Tensor, tensor: Tensor, op: str) -> Tensor:
    counted = op == "mean" or (op == "sum" and tensor.dtype == torch.bool)
    return work if counted else work.to(tensor.dtype)


def _bytes_of(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor's memory; a copy's, where it is not contiguous.

    Sent in place of the tensor: backends differ in the dtypes that they carry.
    """
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


# -- gathering -----------------------------------------------------------------------------------


def _gather(tensor: Tensor, group: Any) -> Tensor:
    shape = (dist.get_world_size(group), *tensor.shape)
    gathered = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    received = [_bytes_of(part) for part in gathered]
    dist.all_gather(received, _bytes_of(tensor), group=group)
    return gathered


class _Gather(torch.autograd.Function):
    """``_gather``, through which gradients flow back to where each part came from."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Not reduce_scatter, which would send less, but which not every backend has.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


# -- broadcasting what the others do not know ----------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Announced:
    """A tensor that is about to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str

    @classmethod
    def of(cls, tensor: Tensor) -> _Announced:
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype, device_type=tensor.device.type)

    def receive(self, device: torch.device, src: int) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype, device=device)
        dist.broadcast(_bytes_of(tensor), src=src)
        return tensor if device.type == self.device_type else tensor.to(self.device_type)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


class _Pickler(pickle.Pickler):
    """Pickles a tensor on a device so that it arrives on the receiving process's own device."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
            return _arrived, (value.detach().cpu(), value.device.type)
        return NotImplemented


def _arrived(tensor: Tensor, device_type: str) -> Tensor:
    return tensor.to(device_type)


def _pickled(value: Any) -> Tensor:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
