"""Local SGD: steps of one's own, and an average of everybody's parameters now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

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
from torchweft.errors import InvalidRequest

__all__ = ["LocalSGD"]

_STEPS = "localsgd_steps"


class LocalSGD(Strategy):
    """Every process steps by itself; parameters are averaged every ``period`` steps.

    Stich, 2018 (arXiv:1805.09767). The state of the optimizers stays with each process. A
    checkpoint holds the average of all processes' models, and rank 0's optimizers.

    Args:
        period: steps of an optimizer from one averaging of its parameters to the next.
    """

    name = "localsgd"
    devices = ("cpu", "cuda")
    cannot: Mapping[str, str] = {
        "clip_by_norm": "gradients are never averaged, so that they have no norm in common; clip "
        "by value (clip_val), or use strategy 'ddp'",
    }

    def __init__(self, *, period: int = 8) -> None:
        if period < 1:
            raise InvalidRequest(
                f"strategy 'localsgd' was given period={period}; it counts steps, from 1"
            )
        self._period = period

    def start(self, place: Place) -> None:
        """Join the process group."""
        super().start(place)
        self._group = join_group(place, backend=place.accelerator.backend)
        self._collectives = ProcessGroup(place.device)
        self._modules: list[nn.Module] = []
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()

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

    # -- training --------------------------------------------------------------------------------

    def setup(self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any) -> Prepared:
        """Give every process the parameters and buffers of rank 0."""
        self._modules.append(module)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.copy_(self._collectives.broadcast(tensor.detach()))
        for optimizer in optimizers:
            self.setup_optimizer(optimizer)
        return super().setup(module, optimizers, scheduler)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Count its steps."""
        self._steps[optimizer] = 0
        return optimizer

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step; average what it trains where that is due."""
        result = super().step(optimizer, closure)
        self._steps[optimizer] += 1
        if self._steps[optimizer] % self._period == 0:
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for module in self._modules:
                if any(id(parameter) in trained for parameter in module.parameters()):
                    self._average(module)
        return result

    @torch.no_grad()
    def _average(self, module: nn.Module) -> None:
        for tensor, mean in self._means((*module.parameters(), *module.buffers())):
            tensor.copy_(mean)

    def _means(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor with the mean of all processes; of what is no number that of rank 0."""
        for tensor in tensors:
            held = tensor.detach()
            if held.is_floating_point():
                yield tensor, self._collectives.all_reduce(held)
            else:
                yield tensor, self._collectives.broadcast(held)

    # -- state -----------------------------------------------------------------------------------

    def module_state(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """The average of all processes, who go on from where each of them is."""
        for name, value in super().module_state(module):
            if isinstance(value, Tensor):
                ((_, value),) = self._means([value])
            yield name, value

    def extra_state(self) -> dict[str, Any]:
        """The steps since the beginning, by optimizer in the order of ``setup``."""
        return {_STEPS: list(self._steps.values())}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the same step, so that the next averaging comes when it would have come."""
        for optimizer, steps in zip(self._steps, state.get(_STEPS, ()), strict=False):
            self._steps[optimizer] = steps
