"""Gradient accumulation: which micro-batches make a group, and what may not happen inside one."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from torchweft.api import Strategy
from torchweft.errors import InvalidRequest, Misuse

__all__ = ["Accumulation", "Groups"]


class Accumulation:
    """Around forward and backward of one micro-batch; what ``fabric.accumulate`` returns.

    Attributes:
        index: the micro-batch, counted from 0.
        group: the micro-batches of its group, the last of which closes it.
        should_step: whether this micro-batch closes its group, so that the optimizer is to step
            behind it.
    """

    def __init__(
        self,
        groups: Groups,
        modules: Sequence[nn.Module],
        index: int,
        group: range,
        contexts: Sequence[Callable[[], AbstractContextManager[Any]]],
    ) -> None:
        self.index = index
        self.group = group
        self.should_step = index == group[-1]
        self._groups = groups
        self._modules = modules
        self._contexts = contexts
        self._entered = ExitStack()

    @property
    def group_size(self) -> int:
        """Micro-batches in the group; less than ``steps`` in a short last one."""
        return len(self.group)

    def __enter__(self) -> Accumulation:
        for module in self._modules:
            self._groups.check(module, self.index, self.group)
        with ExitStack() as entered:
            for context in self._contexts:
                entered.enter_context(context())
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        swallowed = self._entered.__exit__(kind, error, traceback)
        # A micro-batch that failed may be tried again.
        if kind is None:
            for module in self._modules:
                self._groups.done(module, self.index, self.group)
        return swallowed


@dataclass(slots=True)
class _Open:
    """A group that is not complete: where it stands, and one gradient to know it by."""

    index: int
    group: range
    witness: Tensor | None
    gradient: Tensor | None

    @property
    def kept(self) -> bool:
        """Whether its gradients are certainly still there."""
        return self.gradient is not None and _gradient(self.witness) is self.gradient

    @property
    def lost(self) -> bool:
        """Whether its gradients are certainly gone."""
        return self.gradient is not None and _gradient(self.witness) is None


class Groups:
    """The groups of micro-batches that are open in this process, by model.

    A strategy that keeps gradients where they cannot be seen gets no check between micro-batches.
    """

    def __init__(self) -> None:
        self._open: weakref.WeakKeyDictionary[nn.Module, _Open] = weakref.WeakKeyDictionary()
        # torch's own hook before every optimizer's step, none or one; it must not outlive this.
        self._guards: list[RemovableHandle] = []
        weakref.finalize(self, _remove_guards, self._guards)

    def accumulate(
        self,
        strategy: Strategy,
        modules: Sequence[nn.Module],
        *,
        steps: int,
        index: int,
        total: int | Sized | None = None,
        dividing: Callable[[int], AbstractContextManager[Any]] | None = None,
    ) -> Accumulation:
        """One micro-batch of the models that ``strategy`` prepared.

        Args:
            strategy: is told of each micro-batch whether it is the last of its group.
            modules: what the strategy made of the models.
            steps: micro-batches in a group.
            index: this micro-batch, counted from 0.
            total: how many there are, or what has that length; closes a short last group.
            dividing: called with the group's size, the context in which losses are divided by it.

        Raises:
            InvalidRequest: for numbers that do not fit together.
            Misuse: on entering, when the gradients of an open group were lost or left.
        """
        if not modules:
            raise InvalidRequest("fabric.accumulate([]) was given no model; give one, or several")
        group = _group(steps, index, total)
        index = operator.index(index)
        last = index == group[-1]
        contexts: list[Callable[[], AbstractContextManager[Any]]] = [
            # Also where the synchronisation cannot be left out: an engine has to know which
            # micro-batch closes its step.
            lambda module=module: strategy.accumulating(module, last=last)  # type: ignore[misc]
            for module in modules
        ]
        if dividing is not None and len(group) > 1:
            contexts.append(lambda: dividing(len(group)))
        return Accumulation(self, modules, index, group, contexts)

    def check(self, module: nn.Module, index: int, group: range) -> None:
        """Raise ``Misuse`` where this micro-batch cannot follow the one before."""
        before = self._open.get(module)
        if before is None:
            return
        if index in before.group and index > before.index and group[0] == before.group[0]:
            if before.lost:
                raise Misuse(
                    f"the gradients of micro-batches {before.group[0]} to {before.index} are "
                    f"gone: zero_grad() was called in the middle of a group of "
                    f"{len(before.group)}; call it behind optimizer.step(), where acc.should_step "
                    "is true"
                )
            return
        if before.kept:
            if index == before.index:
                raise Misuse(
                    f"fabric.accumulate(index={index}) came twice in a group of "
                    f"{len(before.group)}; index counts micro-batches, as in 'for index, batch in "
                    "enumerate(loader)', and one block holds all of a micro-batch"
                )
            raise Misuse(
                f"fabric.accumulate(index={index}) begins another group, but the one before was "
                f"left after {_progress(before)}, with its gradients still there; give "
                "total=len(loader), which closes a short last group, or call zero_grad() to give "
                "the group up"
            )
        self._forget(module)

    def done(self, module: nn.Module, index: int, group: range) -> None:
        """Note that a micro-batch ended in order."""
        if index == group[-1]:
            self._forget(module)
            return
        witness = next((p for p in module.parameters() if p.grad is not None), None)
        self._open[module] = _Open(index, group, witness, _gradient(witness))
        if not self._guards:
            self._guards.append(_guard_steps(weakref.ref(self)))

    def _forget(self, module: nn.Module) -> None:
        self._open.pop(module, None)
        if not self._open:
            _remove_guards(self._guards)

    def check_step(self, optimizer: Optimizer) -> None:
        """Raise ``Misuse`` where the optimizer belongs to a model with an open group."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for module, before in self._open.items():
            if before.kept and any(id(parameter) in held for parameter in module.parameters()):
                raise Misuse(
                    f"{type(optimizer).__name__}.step() was called in the middle of a group, after "
                    f"{_progress(before)}, and their gradients are not synchronised between the "
                    "processes; step where acc.should_step is true. Where the data ends there, "
                    "give total=len(loader), which closes a short last group; to give the group "
                    "up, call zero_grad()"
                )


def _group(steps: Any, index: Any, total: Any) -> range:
    """The micro-batches of the group that ``index`` is in."""
    steps_ = _whole(steps)
    if steps_ is None or steps_ < 1:
        raise InvalidRequest(
            f"fabric.accumulate(steps={steps!r}): a group has 1 micro-batch or more; steps=1 "
            "accumulates nothing"
        )
    index_ = _whole(index)
    if index_ is None or index_ < 0:
        raise InvalidRequest(
            f"fabric.accumulate(index={index!r}): micro-batches are counted 0, 1, 2, …, as in "
            "'for index, batch in enumerate(loader)'"
        )
    first = index_ - index_ % steps_
    if total is None:
        return range(first, first + steps_)
    total_ = _length(total)
    if index_ >= total_:
        raise InvalidRequest(
            f"fabric.accumulate(index={index_}, total={total_}): micro-batches are counted from 0 "
            "up to total - 1; count from 0 in every epoch, and give the total of the loader that "
            "the loop goes through"
        )
    return range(first, min(first + steps_, total_))


def _length(total: Any) -> int:
    number = _whole(total)
    if number is None:
        try:
            number = len(total)
        except (TypeError, NotImplementedError):
            raise InvalidRequest(
                f"fabric.accumulate(total=): the {type(total).__name__} given has no length; give "
                "the number of micro-batches, or leave total out and end the loop with a whole "
                "group"
            ) from None
    return number


def _whole(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _gradient(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.grad


def _progress(before: _Open) -> str:
    done = before.index - before.group[0] + 1
    return f"{done} of {len(before.group)} micro-batches (index {before.index})"


def _guard_steps(groups: weakref.ref[Groups]) -> RemovableHandle:
    """Have every optimizer ask before it steps; only while a group is open."""

    def ask(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = groups()
        if alive is not None:
            alive.check_step(optimizer)

    return register_optimizer_step_pre_hook(ask)


def _remove_guards(guards: list[RemovableHandle]) -> None:
    while guards:
        guards.pop().remove()
