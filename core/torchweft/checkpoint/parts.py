"""What each rank has to write of a checkpoint in a folder, made from the user's objects."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.api import Run
from torchweft.api.state import as_written, module_versions, parameter_names
from torchweft.checkpoint.layouts import Pair
from torchweft.checkpoint.nesting import is_sharded, local, on_host, rebuilt
from torchweft.checkpoint.ranks import Ranks
from torchweft.checkpoint.state import RESERVED, Filter, Taken, reserved_state
from torchweft.errors import CheckpointError
from torchweft.wrappers import FabricModule, FabricOptimizer

__all__ = ["Parts", "Place", "collect_parts", "stand_in"]

#: The keys that lead to a value in nested dicts, lists and tuples.
Place = tuple[Any, ...]


@dataclass(slots=True)
class Parts:
    """What one rank has of a checkpoint.

    Attributes:
        content: the whole structure, a tensor on the meta device wherever one of ``places``
            belongs; only rank 0's is written.
        tensors: what this rank holds, whole or a part of, and offers to write, by entry.
        places: where in the content each entry belongs, the same in every rank.
        ties: entries that are another one's tensor under a second name.
    """

    content: dict[Any, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)


def collect_parts(
    run: Run,
    ranks: Ranks,
    state: Mapping[str, Any],
    filters: Mapping[str, Filter],
    pairs: Sequence[Pair] = (),
) -> Parts:
    """This rank's part of everything in ``state``; to be called in every rank.

    Both are as the ranks agreed. Tensors of models and of optimizers stay where they are; of
    everything else rank 0's is taken, as in a checkpoint of one file. Filters see sharded tensors
    as they are, and what they decide in rank 0 holds. Of ``pairs``, which are written another way,
    there is None in the content.

    Raises ``CheckpointError`` in every rank, when a part has no state to save in one.
    """
    collector = _Collector(run, ranks, pairs)
    for key, value in state.items():
        collector.add(key, value, filters.get(key))
    collector.add_reserved()
    parts = collector.parts
    parts.ties = ranks.first(lambda: _ties(parts.tensors))
    for entry in parts.ties:
        parts.tensors.pop(entry, None)
    return parts


def stand_in(shape: Any, dtype: torch.dtype) -> Tensor:
    """A tensor without data, in the place of one that is stored elsewhere."""
    return torch.empty(shape, dtype=dtype, device="meta")


class _Collector:
    """Takes the user's objects apart, in the same order in every rank."""

    def __init__(self, run: Run, ranks: Ranks, pairs: Sequence[Pair]) -> None:
        self._strategy = run.strategy
        self._precision = run.precision
        self._ranks = ranks
        self._elsewhere = {place: pair.layout for pair in pairs for place in pair.places}
        self.parts = Parts()

    def add(self, key: str, value: Any, keep: Filter | None) -> None:
        """One item of the state."""

        def collect() -> None:
            self.parts.content[key] = self._value(value, (key,), keep)

        self._ranks.all(collect)

    def add_reserved(self) -> None:
        """What is kept beside the user's objects."""

        def collect() -> None:
            reserved = reserved_state(self._strategy, self._precision)
            self.parts.content[RESERVED] = self._whole(reserved, (), RESERVED)

        self._ranks.all(collect)

    def _value(self, value: Any, place: Place, keep: Filter | None = None) -> Any:
        if place in self._elsewhere:
            self._check_unfiltered(place, keep)
            return None
        if isinstance(value, FabricModule):
            entries = self._strategy.module_state(value.prepared)
            original = self._strategy.original(value.prepared)
            return self._model(original, entries, place, keep, own=False)
        if isinstance(value, FabricOptimizer):
            state = self._strategy.optimizer_state(value.optimizer, value.modules)
            return self._optimizer(state, place, keep, own=False)
        if isinstance(value, Taken):
            return self._taken(value, place, keep)
        if keep is None and isinstance(value, dict | list | tuple):
            return rebuilt(value, lambda item, key: self._value(item, (*place, key)))
        return self._whole(self._kept(value, place, keep), place)

    def _check_unfiltered(self, place: Place, keep: Filter | None) -> None:
        if keep is not None:
            raise CheckpointError(
                f"filter is given for state[{place[0]!r}], and a folder holds it in the layout "
                f"'{self._elsewhere[place].name}', which has no entries to choose from; save to a "
                "path with a suffix, such as 'x.ckpt'"
            )

    def _taken(self, value: Taken, place: Place, keep: Filter | None) -> Any:
        if isinstance(value.of, nn.Module):
            entries = [(as_written(name), each) for name, each in value.state.items()]
            return self._model(value.of, entries, place, keep, own=True)
        if isinstance(value.of, Optimizer):
            return self._optimizer(value.state, place, keep, own=True)
        return self._whole(self._kept(value.state, place, keep), place)

    def _model(
        self,
        module: nn.Module,
        entries: Iterable[tuple[str, Any]],
        place: Place,
        keep: Filter | None,
        own: bool,
    ) -> OrderedDict[str, Any]:
        """``own``: every rank has its own model, of which rank 0's is the one to write."""
        state = self._kept(OrderedDict(entries), place, keep)
        # Buffers may differ between ranks, and one's mean does not go with another's variance.
        equal = self._strategy.replicas_stay_equal and not own
        alike = set(parameter_names([module]).values()) if equal else set()
        for name, value in state.items():
            state[name] = self._tensor(value, (*place, name), everywhere=name in alike)
        state._metadata = module_versions(module)
        written: OrderedDict[str, Any] = state
        return written

    def _optimizer(
        self, state: dict[str, Any], place: Place, keep: Filter | None, own: bool
    ) -> dict[str, Any]:
        kept = self._kept(state, place, keep)
        return {
            key: self._states(value, (*place, key), own)
            if key == "state" and isinstance(value, dict)
            else self._whole(value, (*place, key))
            for key, value in kept.items()
        }

    def _states(self, states: dict[Any, Any], place: Place, own: bool) -> dict[Any, Any]:
        def of(parameter: Any, value: Any, key: Any) -> Any:
            inside = (*place, parameter, key)
            # A counter takes less room where it is used.
            if isinstance(value, Tensor) and value.dim():
                everywhere = self._strategy.replicas_stay_equal and not own
                return self._tensor(value, inside, everywhere=everywhere)
            return self._whole(value, inside)

        return {
            parameter: {key: of(parameter, value, key) for key, value in held.items()}
            if isinstance(held, dict)
            else self._whole(held, (*place, parameter))
            for parameter, held in states.items()
        }

    def _tensor(self, value: Any, place: Place, everywhere: bool) -> Any:
        """What the content has for a tensor; a part of it, or all, is to be written from here."""
        if not _can_be_split(value):
            return self._whole(value, place)
        entry = _entry_for(place, self.parts.places)
        self.parts.places[entry] = place
        if everywhere or self._ranks.is_first or is_sharded(value):
            self.parts.tensors[entry] = value.detach()
        return stand_in(value.shape, value.dtype)

    def _whole(self, value: Any, place: Place, under: str = "state") -> Any:
        path = under + "".join(f"[{key!r}]" for key in place)
        return on_host(value, path, keep=self._ranks.is_first)

    def _kept(self, entries: Any, place: Place, keep: Filter | None) -> Any:
        """Those that the filter keeps, as rank 0 has it."""
        if keep is None:
            return entries
        if not isinstance(entries, MutableMapping):
            raise CheckpointError(
                f"filter is given for state[{place[0]!r}], which is of type "
                f"{type(entries).__name__} and has no entries to choose from"
            )
        names: list[Any] = self._ranks.all(
            lambda: [name for name, value in entries.items() if keep(name, value)]
        )[0]
        kept: Any = copy.copy(entries)
        for name in [name for name in entries if name not in names]:
            del kept[name]
        return kept


def _can_be_split(value: Any) -> bool:
    """Whether parts of a tensor can be written by several ranks and read by others."""
    if is_sharded(value):
        # What is still to be summed is no part.
        return not value.is_meta and not any(each.is_partial() for each in value.placements)
    if not isinstance(value, Tensor) or value.is_meta:
        return False
    plain = type(value) in (Tensor, nn.Parameter)
    return plain and value.layout == torch.strided and not value.is_quantized


def _entry_for(place: Place, taken: Mapping[str, Place]) -> str:
    """The name that torch.distributed.checkpoint gives to this place, unless it is taken."""
    entry = ".".join(map(str, place))
    while entry in taken:
        entry += "'"
    return entry


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By entry, the earlier entry that has the very same memory."""
    first: dict[Any, str] = {}
    ties = {}
    for entry, value in tensors.items():
        held = local(value)
        if not held.numel():
            continue
        # A device may not say where it keeps a tensor.
        where = (held.data_ptr() or id(held), held.device, held.dtype, held.shape, held.stride())
        if first.setdefault(where, entry) != entry:
            ties[entry] = first[where]
    return ties
