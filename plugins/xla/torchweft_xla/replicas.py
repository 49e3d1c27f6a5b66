"""A process per XLA device, which torch-xla calls replication."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.api import DataShard, Place, Prepared
from torchweft.errors import Misuse
from torchweft_xla.library import runtime, xm
from torchweft_xla.strategy import XLAStrategy

__all__ = ["XLAReplicasStrategy"]


class XLAReplicasStrategy(XLAStrategy):
    """A copy of the model in each process, each with one device; gradients are averaged.

    The average is a part of each process's graph, over the TPU's own network. Strategy ``xla``
    does the same with one process per host, and is the one to take where nothing speaks for this.

    Args:
        timeout: seconds that a collective between processes may take before the run is given up.
    """

    name = "xla_replicas"
    processes = "device"
    owns_backward = True

    def __init__(self, *, timeout: float = 1800.0) -> None:
        super().__init__(timeout=timeout)
        self.cannot = {
            "unused_parameters": "the processes' graphs have to be the same, so that every one "
            "makes the same use of a parameter; use strategy='xla'"
        }
        self._modules: list[nn.Module] = []
        self._reduces = True

    def start(self, place: Place) -> None:
        """Meet the other processes."""
        count = place.rank.world_size
        if runtime.is_spmd():
            raise Misuse(
                f"strategy '{self.name}' was started with one process on each host: "
                "strategy='xla' is meant for that"
            )
        if runtime.world_size() != count:
            raise Misuse(
                f"strategy '{self.name}' runs in {count} processes, and XLA knows of "
                f"{runtime.world_size()}: its client for the processor has no replicas, use "
                "strategy='xla' there; on TPUs start a process for each device of a slice"
            )
        super().start(place)

    @property
    def shard(self) -> DataShard:
        """A replica per process."""
        rank = self.place.rank
        return DataShard(replicas=rank.world_size, first=rank.rank)

    # -- setup -----------------------------------------------------------------------------------

    def setup(self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any) -> Prepared:
        """Give every process the parameters and buffers of rank 0."""
        if self.place.rank.world_size > 1:
            with torch.no_grad():
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.copy_(self.collectives.broadcast(tensor.detach()))
        self._modules.append(module)
        return super().setup(module, optimizers, scheduler)

    # -- the step --------------------------------------------------------------------------------

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Without a reduction for every micro-batch but the last: a mean of sums is the same."""
        return nullcontext() if last else self._unreduced()

    @contextmanager
    def _unreduced(self) -> Any:
        before, self._reduces = self._reduces, False
        try:
            yield
        finally:
            self._reduces = before

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Compute gradients and average them; buffers become rank 0's."""
        super().backward(loss, module, *args, **kwargs)
        count = self.place.rank.world_size
        if count == 1 or not self._reduces:
            return
        parameters = [p for each in self._modules for p in each.parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        xm.all_reduce(xm.REDUCE_SUM, gradients, scale=1.0 / count)
        buffers = [b for each in self._modules for b in each.buffers() if b.is_floating_point()]
        if buffers:
            xm.collective_broadcast(buffers)
