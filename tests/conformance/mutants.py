"""A strategy that is right, and others that differ from it in one mistake each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


class Right(Strategy):
    """Gradients averaged by hand when a step closes."""

    name = "right"
    devices = ("cpu",)
    owns_backward = True

    def start(self, place: Place) -> None:
        super().start(place)
        self._group = join_group(place, backend=place.accelerator.backend)
        self._between = ProcessGroup(place.device)
        self._modules: list[nn.Module] = []
        self._closes = True

    def stop(self, failed: bool) -> None:
        leave_group(self._group, failed=failed)

    @property
    def collectives(self) -> Collectives:
        return self._between

    @property
    def shard(self) -> DataShard:
        rank = self.place.rank
        return DataShard(replicas=rank.world_size, first=rank.rank)

    def setup(self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any) -> Prepared:
        self._modules.append(module)
        self.synchronise(module.parameters())
        self.synchronise(module.buffers())
        return super().setup(module, optimizers, scheduler)

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        before, self._closes = self._closes, last
        yield
        self._closes = before

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, module, *args, **kwargs)
        if self._closes:
            for each in self._modules:
                self.average(each)
                self.synchronise(each.buffers())

    def average(self, module: nn.Module) -> None:
        parameters = list(module.parameters())
        mine = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
        has = self._between.all_reduce(mine, "max").tolist()
        used = [p for p, anybody in zip(parameters, has, strict=True) if anybody]
        if used:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
            # All in one: between processes it is the number of messages that counts.
            flat = self.reduce(torch.cat([grad.flatten() for grad in grads]))
            for p, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
                p.grad = part.view_as(p).clone()

    def reduce(self, gradient: Tensor) -> Tensor:
        return self._between.all_reduce(gradient)

    def synchronise(self, tensors: Any) -> None:
        for tensor in tensors:
            tensor.data.copy_(self._between.broadcast(tensor))


class Sums(Right):
    """Gradients are summed instead of averaged."""

    def reduce(self, gradient: Tensor) -> Tensor:
        return self._between.all_reduce(gradient, "sum")


class LeavesBuffers(Right):
    """Buffers are never synchronised."""

    def synchronise(self, tensors: Any) -> None:
        super().synchronise(t for t in tensors if isinstance(t, nn.Parameter))


class ClipsBefore(Right):
    """Gradients are clipped where they are, and averaged after it."""

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        Strategy.backward(self, loss, module, *args, **kwargs)

    def step(self, optimizer: Optimizer, closure: Any) -> Any:
        for each in self._modules:
            self.average(each)
            self.synchronise(each.buffers())
        return super().step(optimizer, closure)


class SkipsTheLastBatch(Right):
    """The last rank leaves out a batch that is smaller than the first one was."""

    _largest = 0

    def move(self, batch: Any) -> Any:
        self._largest = max(self._largest, len(batch[0]))
        self._short = len(batch[0]) < self._largest
        return super().move(batch)

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        rank = self.place.rank
        if getattr(self, "_short", False) and rank.rank == rank.world_size - 1:
            loss = loss * 0
        super().backward(loss, module, *args, **kwargs)


class PrefixesNames(Right):
    """A checkpoint has names of its own, which it understands itself."""

    def module_state(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, value in super().module_state(module):
            yield f"inside.{name}", value

    def load_module_state(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        own = {name.removeprefix("inside."): value for name, value in state.items()}
        super().load_module_state(module, own, strict)


class FeedsEverybodyAll(Right):
    """Every rank trains on all samples, as the base class's shard has it."""

    shard = Strategy.shard


class ForgetsTheOptimizer(Right):
    """The optimizer's state does not come back."""

    def load_optimizer_state(
        self, optimizer: Optimizer, modules: Sequence[nn.Module], state: Mapping[str, Any]
    ) -> None:
        """Nothing."""


class ReducesOneMicroBatch(Right):
    """Of an accumulated gradient the last micro-batch alone is averaged: the rest stays local."""

    def accumulating(self, module: nn.Module, last: bool) -> Any:
        return _keeping(self, module, last)


@contextmanager
def _keeping(strategy: Any, module: nn.Module, last: bool) -> Iterator[None]:
    before, strategy._closes = strategy._closes, last
    held = {p: p.grad for p in module.parameters() if p.grad is not None} if last else {}
    for p in held:
        p.grad = None
    yield
    for p, grad in held.items():
        p.grad = grad if p.grad is None else p.grad + grad
    strategy._closes = before


class _Passes(ProcessGroup):
    def barrier(self) -> None:
        """Nobody waits."""

    def all_reduce(self, tensor: Tensor, op: str = "mean", group: Any = None) -> Tensor:
        # Product and minimum are confused.
        return super().all_reduce(tensor, {"product": "min"}.get(op, op), group)


class PassesBarriers(Right):
    """A barrier holds nobody, and a product is a minimum."""

    def start(self, place: Place) -> None:
        super().start(place)
        self._between = _Passes(place.device)


class DiffersFromTheBeginning(Right):
    """Every rank keeps the parameters that it made."""

    def synchronise(self, tensors: Any) -> None:
        super().synchronise(t for t in tensors if not isinstance(t, nn.Parameter))


class Misspells(Right):
    """A member that nobody calls."""

    def acumulating(self, module: nn.Module, last: bool) -> Any:
        """Nothing."""


class LetsPlainBackwardThrough(Right):
    """``loss.backward()`` trains without an average."""

    owns_backward = False


class KeepsState(Right):
    """Something of one model reaches into the training of the next."""

    _steps = 0

    def step(self, optimizer: Optimizer, closure: Any) -> Any:
        self._steps += 1
        if self._steps > 6:
            optimizer.param_groups[0]["lr"] *= 0.5
        return super().step(optimizer, closure)
