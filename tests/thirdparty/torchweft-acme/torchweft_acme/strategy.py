"""Data parallelism by hand: equal parameters, averaged gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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

    owns_backward = True

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
        self._spread((*module.parameters(), *module.buffers()))
        self._modules.append(module)
        return super().setup(module, optimizers, scheduler)

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; those that close a step are the same everywhere afterwards."""
        super().backward(loss, module, *args, **kwargs)
        if not self._closes_step:
            return
        for held in self._modules:
            self._average(list(held.parameters()))
            self._spread(held.buffers())

    def _average(self, parameters: list[nn.Parameter]) -> None:
        # Where one process alone has a gradient it counts as zero in the others.
        mine = torch.tensor([p.grad is not None for p in parameters])
        for parameter, used in zip(
            parameters, self._collectives.all_reduce(mine, "max").tolist(), strict=True
        ):
            if used:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                sent = grad.bfloat16() if self._compress else grad
                parameter.grad = self._collectives.all_reduce(sent).to(grad.dtype)

    def _spread(self, tensors: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(self._collectives.broadcast(tensor.detach()))

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Leave gradients as they are until the last micro-batch of a step."""
        before, self._closes_step = self._closes_step, last
        try:
            yield
        finally:
            self._closes_step = before
