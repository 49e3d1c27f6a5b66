"""What a checkpoint holds, made from the user's objects."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from torchweft.api import Precision, Strategy
from torchweft.api.state import module_versions
from torchweft.checkpoint.nesting import has_state, key_list, on_host, rebuilt, whole
from torchweft.errors import InvalidRequest, did_you_mean
from torchweft.wrappers import FabricModule, FabricOptimizer

__all__ = ["FORMAT", "RESERVED", "Filter", "check_request", "collect", "reserved_state"]

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

    To be called in every process, since a strategy may have to gather. Models and optimizers that
    were set up are keyed by name; of whatever else has ``state_dict()``, also inside of lists,
    tuples and dicts, that is taken; other values stay as they are. ``filter`` decides by key of
    ``state`` which entries, ``(name, value) -> bool``, are kept; values are whole tensors.

    Raises:
        InvalidRequest: when ``state`` or ``filter`` is not of this form.
        CheckpointError: when a part has no state to save.
    """
    filters = check_request(state, filter)
    content: dict[str, Any] = {}
    for key, value in state.items():
        entries = _collected(value, f"state[{key!r}]", strategy, is_writer, filters.get(key))
        if is_writer:
            content[key] = entries
    reserved = reserved_state(strategy, precision)
    if not is_writer:
        return None
    content[RESERVED] = on_host(reserved, RESERVED, keep=True)
    return content


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


def _collected(
    value: Any, path: str, strategy: Strategy, is_writer: bool, keep: Filter | None = None
) -> Any:
    """What is to be written for ``value``; something undefined where nothing is written."""
    if isinstance(value, FabricModule):
        return _module_entries(value, path, strategy, is_writer, keep)
    entries: Any
    if isinstance(value, FabricOptimizer):
        entries = strategy.optimizer_state(value.optimizer, value.modules)
    elif has_state(value):
        entries = value.state_dict()
    else:
        entries = rebuilt(
            value, lambda item, key: _collected(item, f"{path}[{key!r}]", strategy, is_writer)
        )
    entries = on_host(entries, path, keep=is_writer)
    if keep is None or not is_writer:
        return entries
    if not isinstance(entries, MutableMapping):
        raise InvalidRequest(
            f"filter is given for {path}, which is of type {type(value).__name__} and has no "
            "entries to choose from"
        )
    kept: Any = copy.copy(entries)
    for name, item in entries.items():
        if not keep(name, item):
            del kept[name]
    return kept


def _module_entries(
    module: FabricModule, path: str, strategy: Strategy, is_writer: bool, keep: Filter | None
) -> OrderedDict[str, Any]:
    entries: OrderedDict[str, Any] = OrderedDict()
    for name, value in strategy.module_state(module.prepared):
        # One at a time, so that no process ever holds a second copy of the whole model on its
        # device, and only the writer holds one at all.
        gathered = whole(value)
        if isinstance(gathered, Tensor):
            gathered = gathered.detach()
        if is_writer and (keep is None or keep(name, gathered)):
            entries[name] = on_host(gathered, f"{path}[{name!r}]", keep=True)
    if is_writer:
        entries._metadata = module_versions(module.module)  # type: ignore[attr-defined]
    return entries
