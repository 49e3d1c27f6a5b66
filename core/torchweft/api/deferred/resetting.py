"""Filling modules by their own ``reset_parameters``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchweft.api.deferred.slots import Settle, is_plain, own_tensors
from torchweft.api.deferred.tape import on_meta
from torchweft.errors import InvalidRequest

__all__ = ["Reset", "resets"]


@dataclass(slots=True)
class Reset:
    """A module whose own tensors nobody recorded; ``names`` of those to be filled."""

    module: nn.Module
    title: str
    names: dict[str, tuple[str, ...]]

    def method(self) -> Any:
        """What fills it. Raises ``InvalidRequest`` where there is nothing."""
        cls: Any = type(self.module)
        reset = getattr(cls, "reset_parameters", None) or getattr(cls, "_reset_parameters", None)
        if reset is None:
            raise InvalidRequest(
                f"{self.title} was made on the meta device and cannot be filled: it has no "
                f"reset_parameters() to fill {self._what(self.names)}; build the model under "
                "fabric.init_module(), or give the class that method"
            )
        return reset

    def fill(self, device: torch.device, settle: Settle) -> None:
        """Run it on whole tensors in the places of the present ones, and settle these."""
        registers: list[Any] = [self.module._parameters, self.module._buffers]
        before = [dict(register) for register in registers]
        try:
            for register in registers:
                register.update(self._stand_ins(register, device))
            with torch.no_grad(), device:
                self.method()(self.module)
            after = own_tensors(self.module)
        finally:
            for register, held in zip(registers, before, strict=True):
                register.update(held)
        if untouched := [name for name in self.names if _is_marked(after[name])]:
            raise InvalidRequest(
                f"{self.title} was made on the meta device and cannot be filled: its "
                f"reset_parameters() leaves {self._what(untouched)} as memory was; build the "
                "model under fabric.init_module(), or let that method fill it"
            )
        for name, names in self.names.items():
            settle(names, after.pop(name).detach())

    def _stand_ins(self, register: Any, device: torch.device) -> dict[str, Tensor]:
        """Whole tensors for all of them: the method may write to more than what is missing."""
        fresh: dict[str, Tensor] = {}
        for name, held in register.items():
            if held is None or nn.parameter.is_lazy(held):
                continue
            whole = torch.empty(held.shape, dtype=held.dtype, device=device)
            if name in self.names:
                _mark(whole)
            elif is_plain(held) and not on_meta(held):
                # What was split meanwhile is put together; every process comes by here.
                gather = getattr(held, "full_tensor", None)
                whole.copy_(held if gather is None else gather())
            is_parameter = isinstance(held, nn.Parameter)
            fresh[name] = nn.Parameter(whole, held.requires_grad) if is_parameter else whole
        return fresh

    @staticmethod
    def _what(names: Iterable[str]) -> str:
        return ", ".join(f"'{name}'" for name in names)


def resets(module: nn.Module, names: Mapping[int, tuple[str, ...]]) -> Iterator[Reset]:
    """Every tensor once, by the first module that has it."""
    left = dict(names)
    for path, each in module.named_modules():
        own = {
            name: left.pop(id(tensor))
            for name, tensor in own_tensors(each).items()
            if id(tensor) in left
        }
        if own:
            cls = type(each).__name__
            reset = Reset(each, f"{path} ({cls})" if path else f"the model ({cls})", own)
            reset.method()
            yield reset


def _mark(tensor: Tensor) -> None:
    """Fill with what no initialisation leaves."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(torch.nan)
    elif tensor.dtype in _WIDE:
        tensor.fill_(torch.iinfo(tensor.dtype).min)


def _is_marked(tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return tensor.dtype in _WIDE and bool((tensor == torch.iinfo(tensor.dtype).min).any())


_WIDE = (torch.int16, torch.int32, torch.int64)
