"""Data parallelism by hand: equal parameters, averaged gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.api import (
    Collectives,
    DataShard,
    Place,
    Prepared,
    ProcessGroup,
    Strategy,
    join_group,
    leave_group,
)

__all__ = ["AcmeStrategy"]


class AcmeStrategy(Strategy):
    """Every process has the whole model; gradients are averaged after the backward pass.

    Args:
        compress: send gradients in bfloat16: fewer bytes, and two or three digits.
    """

    def __init__(self, *, compress: bool = False) -> None:
        self._compress = compress
        self._modules: list[nn.Module] = []
        self._closes_step = True

    def start(self, place: Place) -> None:
        """Join the process group."""
        super().start(place)
        self._group = join_group(place, backend=place.accelerator.backend)
        self._collectives = ProcessGroup(place.device)

    def stop(self, failed: bool) -> None:
        """Leave the process group."""
        leave_group(self._group, failed=failed)

    @property
    def collectives(self) -> Collectives:
        """Over all processes."""
        return self._collectives

    @property
    def shard(self) -> DataShard:
        """One replica per process."""
        rank = self.place.rank
        return DataShard(replicas=rank.world_size, first=rank.rank)

    def setup(self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any) -> Prepared:
        """Give every process the parameters and buffers of rank 0."""
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.copy_(self._collectives.broadcast(tensor.detach()))
        self._modules.append(module)
        return super().setup(module, optimizers, scheduler)

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; those that close a step are the same everywhere afterwards."""
        super().backward(loss, module, *args, **kwargs)
        if not self._closes_step:
            return
        for parameter in (p for held in self._modules for p in held.parameters()):
            if parameter.grad is not None:
                sent = parameter.grad.bfloat16() if self._compress else parameter.grad
                parameter.grad.copy_(self._collectives.all_reduce(sent))

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Leave gradients as they are until the last micro-batch of a step."""
        before, self._closes_step = self._closes_step, last
        try:
            yield
        finally:
            self._closes_step = before
