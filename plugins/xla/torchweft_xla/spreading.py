"""How tensors lie on the devices of a run: torch-xla's shardings of one dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchweft_xla.library import runtime, spmd, xm

__all__ = ["Spread"]


class Spread:
    """All devices in a row, along which a dimension of a tensor may be divided.

    Args:
        hosts: processes of the run, each with as many of the devices.
    """

    def __init__(self, hosts: int) -> None:
        self.devices = runtime.global_runtime_device_count()
        self.local = runtime.addressable_runtime_device_count()
        self.hosts = hosts
        self._mesh = spmd.Mesh(list(range(self.devices)), (self.devices,), ("data",))
        self._shardings: dict[tuple[int, int, bool], Any] = {}

    def sharding(self, dims: int, dim: int, minibatch: bool = False) -> Any:
        """Of tensors with ``dims`` dimensions along one of them; the same object each time."""
        key = dims, dim, minibatch
        if key not in self._shardings:
            spec = _along(dims, dim)
            self._shardings[key] = spmd.ShardingSpec(self._mesh, spec, minibatch=minibatch)
        return self._shardings[key]

    def send(self, tensor: Tensor, dim: int | None) -> Tensor:
        """A tensor of the host on all devices; None: a copy on each."""
        several = self.hosts > 1
        spec = None if dim is None else self.sharding(tensor.dim(), dim, minibatch=several)
        sent: Tensor = xm.send_cpu_data_to_device([tensor], "xla:0", input_sharding=spec)[0]
        return sent

    def divide(self, tensor: Tensor, dim: int | None) -> None:
        """Let a tensor that is on the devices lie divided along a dimension, in place.

        None: a copy on each.
        """
        spmd.mark_sharding(tensor, self._mesh, _along(tensor.dim(), dim))

    def divided(self, tensor: Tensor, dim: int | None) -> Tensor:
        """The same tensor for what is computed with it, its gradient divided like it."""
        spec = _along(tensor.dim(), dim)
        found: Tensor = spmd.mark_sharding_with_gradients(tensor, self._mesh, spec)
        return found

    def longest(self, tensor: Tensor) -> int | None:
        """The dimension to divide: the longest that divides evenly; None where there is none."""
        even = [d for d in range(tensor.dim()) if tensor.shape[d] % self.devices == 0]
        return max(even, key=lambda d: tensor.shape[d], default=None)


def _along(dims: int, dim: int | None) -> tuple[str | None, ...]:
    """torch-xla's partition of a tensor with so many dimensions along one; None: along none."""
    return tuple("data" if i == dim else None for i in range(dims))
