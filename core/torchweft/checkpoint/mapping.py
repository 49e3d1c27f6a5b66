"""A checkpoint of one file whose tensors stay in it until they are used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torchweft.checkpoint.nesting import local, rebuilt
from torchweft.checkpoint.restoring import Source

__all__ = ["MappedFile"]


class MappedFile(Source):
    """Its content has tensors in memory that the file is mapped to.

    What a run goes on with is copied: it is not to depend on a file that something else may cut
    short, or that is gone from another machine's file system.
    """

    def whole(self, value: Any) -> Any:
        """A copy."""
        return copy.deepcopy(value)

    def unused(self, value: Any) -> Any:
        """As it is."""
        return value

    def for_model(self, own: Callable[[], Iterable[tuple[str, Any]]], saved: Any) -> Any:
        """Parameters and buffers as they are, since a module copies them into its own."""
        kept = copy.copy(saved)
        for name, value in saved.items():
            if not isinstance(value, Tensor) or str(name).endswith("_extra_state"):
                kept[name] = copy.deepcopy(value)
        return kept

    def settle(self, optimizer: Optimizer, saved: Any) -> None:
        """Copy what is in the file still, which is what had the right dtype and device."""
        mapped = {_memory(tensor) for tensor in _tensors(saved)} - {None}

        def settled(value: Any, _: Any = None) -> Any:
            if isinstance(value, Tensor):
                return value.clone() if _memory(value) in mapped else value
            return rebuilt(value, settled)

        for parameter, held in list(optimizer.state.items()):
            own = settled(held)
            if own is not held:
                optimizer.state[parameter] = own


def _memory(tensor: Tensor) -> int | None:
    """Where it lies in the host's memory; None where it does not, and so in no file's."""
    mine = local(tensor)
    return mine.untyped_storage().data_ptr() if mine.device.type == "cpu" else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
