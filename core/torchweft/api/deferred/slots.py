"""The places of a module that hold tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchweft.api.deferred.tape import View, on_meta

__all__ = ["Settle", "Slot", "attributes", "is_plain", "named_tensors", "own_tensors"]


#: What is done with a tensor that has its values: all of its names in the module, and the whole
#: tensor, which is freed afterwards unless it is kept.
Settle: TypeAlias = Callable[[tuple[str, ...], Tensor], None]


@dataclass(slots=True)
class Slot:
    """A place in a module for a tensor: names, or an attribute of one of its modules."""

    names: tuple[str, ...]
    tensor: Tensor
    view: View
    owner: nn.Module | None = None
    attribute: str = ""

    def settle(self, whole: Tensor, settle: Settle) -> None:
        """Hand a tensor that is complete to the caller, or set the attribute."""
        whole = whole.to(self.tensor.dtype)
        if self.owner is None:
            settle(self.names, whole)
            return
        whole.requires_grad_(self.tensor.requires_grad)
        held = vars(self.owner)[self.attribute]
        vars(self.owner)[self.attribute] = _exchanged(held, self.tensor, whole)


def _exchanged(held: Any, old: Tensor, new: Tensor) -> Any:
    """``held`` with ``new`` in the place of ``old``; what can be changed stays the same object."""
    if isinstance(held, list):
        held[:] = [new if each is old else each for each in held]
    elif isinstance(held, dict):
        held.update({key: new for key, each in held.items() if each is old})
    elif isinstance(held, tuple):
        return tree_map(lambda each: new if each is old else each, held)
    return new if held is old else held


def attributes(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Tensors without memory that are neither parameters nor buffers, with where they are."""
    for owner in module.modules():
        for name, held in vars(owner).items():
            # The module's own registers: names of parameters and buffers, and hooks.
            if name in _REGISTERS:
                continue
            each = held.values() if isinstance(held, dict) else held
            for value in each if isinstance(held, list | tuple | dict) else (held,):
                if is_plain(value) and on_meta(value):
                    yield owner, name, value


_REGISTERS = frozenset(vars(nn.Module()))


def is_plain(value: Any) -> bool:
    """Whether it is a tensor with strides."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    return {
        f"{prefix}{'.' if prefix else ''}{name}": tensor
        for prefix, each in module.named_modules(remove_duplicate=False)
        for name, tensor in own_tensors(each).items()
    }


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module without those of the modules in it."""
    both: dict[str, Any] = {**module._parameters, **module._buffers}
    # What is lazy has neither shape nor values before the first forward pass.
    return {k: t for k, t in both.items() if not nn.parameter.is_lazy(t) and is_plain(t)}
