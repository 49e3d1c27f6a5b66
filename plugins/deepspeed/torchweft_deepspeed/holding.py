"""Where DeepSpeed keeps parameters in 32-bit and the optimizer's state, by stage.

A ``Holding`` gives whole tensors, one at a time, and takes them. All processes call it in the same
order: what is divided between them is gathered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from torchweft.errors import CheckpointError

__all__ = ["Divided", "Flat", "Holding", "Whole", "holding_of"]


class Holding(ABC):
    """The parameters of one model and what its optimizer keeps of them.

    Attributes:
        optimizer: the one that steps what is held.
        held: by what is stepped, the parameters that it consists of.
    """

    def __init__(
        self, optimizer: Any, held: Sequence[tuple[Tensor, Sequence[nn.Parameter]]]
    ) -> None:
        self.optimizer = optimizer
        self.held = list(held)
        self._tensor_of = {id(p): tensor for tensor, parameters in held for p in parameters}

    def has(self, parameter: Tensor) -> bool:
        """Whether it is stepped."""
        return id(parameter) in self._tensor_of

    @abstractmethod
    def full(self, parameter: nn.Parameter) -> Tensor:
        """The parameter in 32-bit, or as it is where it is not stepped."""

    @abstractmethod
    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set what ``full`` gives of a parameter that is stepped."""

    def slots(self, parameter: Tensor) -> Mapping[str, Any]:
        """What this process has of the optimizer's state of a parameter."""
        slots: Mapping[str, Any] = self.optimizer.state.get(self._tensor_of[id(parameter)], {})
        return slots

    def is_divided(self, parameter: Tensor, value: Any) -> bool:
        """Whether a value in ``slots`` has one number for each of the parameter's."""
        tensor = self._tensor_of[id(parameter)]
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape == tensor.shape

    @abstractmethod
    def full_slot(self, parameter: nn.Parameter, key: str) -> Tensor:
        """One value of the optimizer's state that is divided, whole."""

    @abstractmethod
    def fill_slot(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set what ``full_slot`` gives."""

    def restore(
        self, states: Mapping[nn.Parameter, Mapping[str, Any]], names: Mapping[int, str]
    ) -> None:
        """Set the optimizer's state, by parameter; ``names`` are for the words of an error.

        Raises ``CheckpointError`` for what cannot be divided.
        """
        # DeepSpeed's own optimizers hand their counters to code that takes no tensor for one.
        plain = type(self.optimizer).__module__.startswith("deepspeed.")
        for index, (tensor, parameters) in enumerate(self.held):
            mine = {p: states[p] for p in parameters if states.get(p)}
            with self.at_hand(index):
                if mine:
                    self._begin(tensor, _empty(tensor, mine, names, plain))
                else:
                    self.optimizer.state.pop(tensor, None)
        self.link()
        for parameter, slots in states.items():
            for key, value in slots.items():
                if self.is_divided(parameter, self.slots(parameter).get(key)):
                    self.fill_slot(parameter, key, value)

    def _begin(self, tensor: Tensor, state: dict[str, Any]) -> None:
        """Have this state, whose tensors are still empty, stepped."""
        self.optimizer.state[tensor] = state

    def at_hand(self, index: int) -> AbstractContextManager[None]:
        """While it is entered, that of ``held`` and its state are in memory."""
        return nullcontext()

    @torch.no_grad()
    def begin(self) -> None:
        """Undo a step that DeepSpeed took to have the optimizer make its state."""
        self.optimizer.state.clear()
        for _, parameters in self.held:
            for parameter in parameters:
                self.fill(parameter, parameter.detach())

    def link(self) -> None:  # noqa: B027 - most know it at any time
        """Look where the optimizer's state is; before it is gathered, and after it was made."""


def _empty(
    tensor: Tensor,
    states: Mapping[nn.Parameter, Mapping[str, Any]],
    names: Mapping[int, str],
    plain: bool,
) -> dict[str, Any]:
    """State for what is stepped at once: zeros, and the counters that all in it have."""
    made: dict[str, Any] = {}
    for parameter, slots in states.items():
        for key, value in slots.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                if value.numel() != _size(parameter):
                    raise CheckpointError(
                        f"'{key}' of '{names[id(parameter)]}' has the shape {tuple(value.shape)}, "
                        "and DeepSpeed divides only what has one number for each of the "
                        "parameter's"
                    )
                made.setdefault(key, torch.zeros_like(tensor, requires_grad=False))
                continue
            if plain and isinstance(value, Tensor):
                value = int(value.item())
            elif isinstance(value, Tensor):
                value = value.clone()
            if made.setdefault(key, value) != value:
                raise CheckpointError(
                    f"'{key}' is {made[key]} of some parameters and {value} of "
                    f"'{names[id(parameter)]}'; DeepSpeed steps the parameters of a group "
                    "together and has one for all"
                )
    return made


def _size(parameter: Any) -> int:
    """Its number of elements, also where none of them is here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class Whole(Holding):
    """Stage 0: everything in every process. Parameters in 16 bits have a copy in 32."""

    def full(self, parameter: nn.Parameter) -> Tensor:
        """The tensor itself."""
        return self._tensor_of.get(id(parameter), parameter).detach()

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Into the tensor itself."""
        self.full(parameter).copy_(value.view(parameter.shape))

    def full_slot(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The tensor itself."""
        value: Tensor = self.slots(parameter)[key]
        return value

    def fill_slot(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Into the tensor itself."""
        self.full_slot(parameter, key).copy_(value)


class Flat(Holding):
    """Stages 1 and 2: every process has the model, and steps a part of it in 32-bit."""

    def __init__(self, zero: Any) -> None:
        super().__init__(
            zero.optimizer,
            list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)),
        )
        self._zero = zero

    def full(self, parameter: nn.Parameter) -> Tensor:
        """Gathered."""
        if not self.has(parameter):
            return parameter.detach()
        held: Any = parameter
        whole: Tensor = held.get_full_hp_param()
        return whole.detach()

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Each process takes its part."""
        held: Any = parameter
        held.set_full_hp_param(value)

    def full_slot(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Gathered."""
        held: Any = parameter
        whole: Tensor = held.get_full_hp_param(key)
        return whole

    def fill_slot(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Each process takes its part."""
        held: Any = parameter
        held.set_full_hp_param(value, key)

    def link(self) -> None:
        """DeepSpeed looks once, behind the first step of the first group, where one is missing."""
        for tensor, parameters in self.held:
            for parameter in parameters:
                held: Any = parameter
                if held._hp_mapping is not None:
                    state = self.optimizer.state.get(tensor, {})
                    held._hp_mapping.set_optim_state_fragment(tensor, state)


class Divided(Holding):
    """Stage 3: a process has its part of every parameter alone."""

    def __init__(self, zero: Any) -> None:
        groups = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        super().__init__(zero.optimizer, list(groups))
        self._zero = zero

    @contextmanager
    def at_hand(self, index: int) -> Iterator[None]:
        """Read from the drive, where it is there, and written to it afterwards."""
        away = self._zero._swappable_optimizer_subgroup(index)
        if away:
            self._zero._optimizer_states_and_gradient_swap_in(index)
        yield
        if away:
            self._zero._optimizer_states_and_gradient_swap_out(index)

    def _begin(self, tensor: Tensor, state: dict[str, Any]) -> None:
        # What goes to a drive is known there by the tensors that were made first.
        before = self.optimizer.state.get(tensor) or {}
        kept = {
            key: before[key].zero_()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim() and key in before
        }
        self.optimizer.state[tensor] = {**state, **kept}

    def full(self, parameter: nn.Parameter) -> Tensor:
        """Gathered."""
        if not self.has(parameter):
            return gathered(parameter)
        whole: Tensor = self._zero.get_full_hp_param(parameter)
        return whole.detach()

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Each process takes its part."""
        self._zero.set_local_hp_param(self._part(parameter, value), parameter)

    def full_slot(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Gathered."""
        whole: Tensor = self._zero.get_full_hp_param(parameter, key)
        return whole

    def fill_slot(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Each process takes its part."""
        self._zero.set_local_hp_param(self._part(parameter, value), parameter, key)

    def _part(self, parameter: Any, value: Tensor) -> Tensor:
        """This process's part; the last ones are filled up, so that all are of one size."""
        size, first = parameter.ds_tensor.numel(), self._zero._get_param_partition_rank(parameter)
        flat = value.detach().flatten()[first * size : (first + 1) * size]
        return pad(flat, (0, size - flat.numel()))


class Gathered(Holding):
    """Stage 3 without an optimizer: parts of parameters, and nothing that is stepped."""

    def __init__(self) -> None:
        super().__init__(None, [])

    def full(self, parameter: nn.Parameter) -> Tensor:
        """Gathered."""
        return gathered(parameter)

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Nothing is held in 32-bit."""

    def full_slot(self, parameter: nn.Parameter, key: str) -> Tensor:
        """There is none."""
        raise KeyError(key)

    def fill_slot(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """There is none."""
        raise KeyError(key)


def gathered(parameter: nn.Parameter) -> Tensor:
    """A copy of a parameter that is divided between processes."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def holding_of(live: Any, stage: int) -> Holding:
    """How an engine of DeepSpeed holds what it was given."""
    zero = live.optimizer
    if stage == 0:
        return Whole(live.basic_optimizer, list(_masters(zero)))
    if stage < 3:
        return Flat(zero)
    return Divided(zero) if live.basic_optimizer is not None else Gathered()


def _masters(optimizer: Any) -> Iterator[tuple[Tensor, Sequence[nn.Parameter]]]:
    """What stage 0 steps: the parameters themselves, or their copies in 32-bit."""
    groups = getattr(optimizer, "fp16_groups", None)
    if groups is None:
        for group in optimizer.param_groups:
            yield from ((parameter, [parameter]) for parameter in group["params"])
    elif hasattr(optimizer, "fp32_groups"):
        for low, full in zip(groups, optimizer.fp32_groups, strict=True):
            yield from ((master, [parameter]) for parameter, master in zip(low, full, strict=True))
