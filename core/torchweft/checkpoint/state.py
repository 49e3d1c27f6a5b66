"""What a checkpoint holds, made from the user's objects."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchweft.api import Precision, Strategy
from torchweft.api.state import module_versions
from torchweft.checkpoint.nesting import has_state, key_list, on_host, rebuilt, whole
from torchweft.errors import InvalidRequest, did_you_mean
from torchweft.wrappers import FabricModule, FabricOptimizer

__all__ = [
    "FORMAT",
    "RESERVED",
    "Filter",
    "Taken",
    "check_request",
    "collect",
    "reserved_state",
    "taken",
]

Filter = Callable[[str, Any], bool]

#: The key under which a checkpoint keeps what the next step depends on beside the user's objects.
RESERVED = "torchweft"

#: Of what is under that key.
FORMAT = 1


def collect(
    state: Mapping[str, Any],
    *,
    strategy: Strategy,
    precision: Precision,
    is_writer: bool,
    filter: Mapping[str, Filter] | None = None,
) -> dict[str, Any] | None:
    """Plain values and CPU tensors for everything in ``state``; None unless ``is_writer``.

    To be called in every process, since a strategy may have to gather; what fails in one is raised
    when all is gathered, so that no other waits for it. Models and optimizers that were set up are
    keyed by name; of whatever else has ``state_dict()``, also inside of lists, tuples and dicts,
    that is taken; other values stay as they are. ``filter`` decides by key of ``state`` which
    entries, ``(name, value) -> bool``, are kept; values are whole tensors.

    Raises:
        InvalidRequest: when ``state`` or ``filter`` is not of this form.
        CheckpointError: when a part has no state to save.
    """
    filters = check_request(state, filter)
    state = {key: taken(value) for key, value in state.items()}
    collector = _Collector(strategy, is_writer)
    content = {
        key: collector.part(value, f"state[{key!r}]", filters.get(key))
        for key, value in state.items()
    }
    reserved = collector.tried(reserved_state, strategy, precision)
    content[RESERVED] = collector.part(Taken(None, reserved), RESERVED)
    if collector.failure is not None:
        raise collector.failure
    return content if is_writer else None


def reserved_state(strategy: Strategy, precision: Precision) -> dict[str, Any]:
    """What is kept under the reserved key; to be called in every process."""
    return {
        "format": FORMAT,
        "precision": precision.state_dict(),
        "strategy": strategy.extra_state(),
    }


def check_request(state: Any, filter: Any) -> Mapping[str, Filter]:
    """The filters, by key. Raises ``InvalidRequest`` for what is not of the form."""
    if not isinstance(state, Mapping):
        raise InvalidRequest(
            f"the state to save is of type {type(state).__name__}; give a dict, such as "
            "{'model': model, 'optimizer': optimizer}"
        )
    if RESERVED in state:
        raise InvalidRequest(
            f"the key '{RESERVED}' of a checkpoint is reserved; give that part another name"
        )
    if filter is None:
        return {}
    if not isinstance(filter, Mapping):
        raise InvalidRequest(
            f"filter is of type {type(filter).__name__}; give a dict with keys of the state, such "
            "as {'model': lambda name, value: 'head' in name}"
        )
    for key, keep in filter.items():
        if key not in state:
            raise InvalidRequest(
                f"filter has the key {key!r}, which is not in the state"
                f"{did_you_mean(str(key), map(str, state)) or ';'} it holds {key_list(state)}"
            )
        if not callable(keep):
            raise InvalidRequest(
                f"filter[{key!r}] is of type {type(keep).__name__}; give a function of (name, "
                "value) that returns whether to keep it"
            )
    return filter


@dataclass(frozen=True, slots=True)
class Taken:
    """An object that was not set up, and its state.

    Attributes:
        of: the object.
        state: what its ``state_dict()`` gave.
    """

    of: Any
    state: Any


def taken(value: Any) -> Any:
    """``value`` with the state of every object in it that was not set up, which says nothing."""
    if isinstance(value, FabricModule | FabricOptimizer | Taken):
        return value
    if has_state(value):
        return Taken(value, value.state_dict())
    return rebuilt(value, lambda item, _: taken(item))


class _Collector:
    """Takes the user's objects apart, all of them in the same order in every process.

    Others wait for their parts of what is gathered, so that this one goes on when something fails,
    and keeps nothing from then on.
    """

    def __init__(self, strategy: Strategy, is_writer: bool) -> None:
        self._strategy = strategy
        self._is_writer = is_writer
        self.failure: Exception | None = None

    @property
    def _keeps(self) -> bool:
        return self._is_writer and self.failure is None

    def tried(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What it returns; None, where it fails."""
        try:
            return function(*arguments)
        except Exception as error:
            self.failure = self.failure or error

    def part(self, value: Any, path: str, keep: Filter | None = None) -> Any:
        """What is to be written for ``value``; something undefined where nothing is written."""
        if isinstance(value, FabricModule):
            entries: Any = OrderedDict()
            self.tried(self._gather, value, path, keep, entries)
            return entries
        if isinstance(value, FabricOptimizer):
            entries = self.tried(self._strategy.optimizer_state, value.optimizer, value.modules)
        elif isinstance(value, Taken):
            entries = value.state
        else:
            entries = rebuilt(value, lambda item, key: self.part(item, f"{path}[{key!r}]"))
        entries = self.tried(self._on_host, entries, path)
        if keep is None or not self._keeps:
            return entries
        return self.tried(_kept, entries, value, path, keep)

    def _gather(
        self, module: FabricModule, path: str, keep: Filter | None, entries: OrderedDict[str, Any]
    ) -> None:
        for name, value in self._strategy.module_state(module.prepared):
            # One at a time, so that no process ever holds a second copy of the whole model on its
            # device, and only the writer holds one at all.
            gathered = whole(value)
            if isinstance(gathered, Tensor):
                gathered = gathered.detach()
            if self._keeps and (keep is None or self.tried(keep, name, gathered)):
                entries[name] = self.tried(self._on_host, gathered, f"{path}[{name!r}]")
        if self._keeps:
            entries._metadata = module_versions(module.module)  # type: ignore[attr-defined]

    def _on_host(self, value: Any, path: str) -> Any:
        return on_host(value, path, keep=self._keeps)


def _kept(entries: Any, value: Any, path: str, keep: Filter) -> Any:
    if not isinstance(entries, MutableMapping):
        kind = type(value.of if isinstance(value, Taken) else value).__name__
        raise InvalidRequest(
            f"filter is given for {path}, which is of type {kind} and has no entries to choose from"
        )
    kept: Any = copy.copy(entries)
    for name, item in entries.items():
        if not keep(name, item):
            del kept[name]
    return kept
