"""What a checkpoint holds: made from the user's objects, and put back into them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.optim import Optimizer

from torchweft.api import Precision, Strategy
from torchweft.api.state import (
    load_named_module_state,
    load_named_optimizer_state,
    module_versions,
)
from torchweft.errors import CheckpointError, InvalidRequest, did_you_mean
from torchweft.wrappers import FabricModule, FabricOptimizer

__all__ = ["RESERVED", "collect", "restore"]

Filter = Callable[[str, Any], bool]

#: The key under which a checkpoint keeps what the next step depends on beside the user's objects.
RESERVED = "torchweft"

_FORMAT = 1

# What raw state dictionaries of wrapped models have before every name.
_WRAPPER_PREFIXES = ("module.", "_forward_module.")


# -- from the user's objects ---------------------------------------------------------------------


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
    filters = _check_request(state, filter)
    content: dict[str, Any] = {}
    for key, value in state.items():
        entries = _collected(value, f"state[{key!r}]", strategy, is_writer, filters.get(key))
        if is_writer:
            content[key] = entries
    reserved = {
        "format": _FORMAT,
        "precision": precision.state_dict(),
        "strategy": strategy.extra_state(),
    }
    if not is_writer:
        return None
    content[RESERVED] = _on_host(reserved, RESERVED, keep=True)
    return content


def _check_request(state: Any, filter: Any) -> Mapping[str, Filter]:
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
                f"{did_you_mean(str(key), map(str, state)) or ';'} it holds {_keys(state)}"
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
    elif _has_state(value):
        entries = value.state_dict()
    else:
        entries = _rebuilt(
            value, lambda item, key: _collected(item, f"{path}{key}", strategy, is_writer)
        )
    entries = _on_host(entries, path, keep=is_writer)
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
        whole = _whole(value)
        if isinstance(whole, Tensor):
            whole = whole.detach()
        if is_writer and (keep is None or keep(name, whole)):
            entries[name] = _on_host(whole, f"{path}[{name!r}]", keep=True)
    if is_writer:
        entries._metadata = module_versions(module.module)  # type: ignore[attr-defined]
    return entries


def _has_state(value: Any) -> bool:
    return not isinstance(value, type) and callable(getattr(value, "state_dict", None))


def _rebuilt(value: Any, function: Callable[[Any, str], Any]) -> Any:
    """``value``, or a copy of a dict, list or tuple some of whose items ``function`` changed.

    ``function`` gets an item and its subscript as text. Items are visited in order everywhere.
    """
    if isinstance(value, dict):
        new = {key: function(item, f"[{key!r}]") for key, item in value.items()}
        if all(new[key] is item for key, item in value.items()):
            return value
        # A shallow copy keeps the class and what torch attaches to a module's state.
        rebuilt = copy.copy(value)
        rebuilt.update(new)
        return rebuilt
    if isinstance(value, list | tuple):
        items = [function(item, f"[{index}]") for index, item in enumerate(value)]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return _sequence_like(value, items)
    return value


def _sequence_like(old: Any, items: list[Any]) -> Any:
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def _on_host(value: Any, path: str, *, keep: bool) -> Any:
    """Tensors whole and on the CPU; ``keep=False`` takes part in gathering alone."""
    if isinstance(value, Tensor):
        whole = _whole(value)
        if not keep:
            return None
        if whole.is_meta:
            raise CheckpointError(
                f"{path} is on the meta device and holds no data; fill it before saving"
            )
        return whole if whole.device.type == "cpu" else whole.detach().cpu()
    return _rebuilt(value, lambda item, key: _on_host(item, f"{path}{key}", keep=keep))


def _whole(value: Any) -> Any:
    """A sharded tensor gathered; importing DTensor to ask for its class would take a second."""
    gather = getattr(value, "full_tensor", None) if isinstance(value, Tensor) else None
    return value if gather is None else gather()


# -- back into the user's objects ----------------------------------------------------------------


def restore(
    content: Any,
    state: Any,
    *,
    strategy: Strategy,
    precision: Precision,
    strict: bool = True,
) -> dict[str, Any]:
    """Fill what ``state`` holds in place, and return what else ``content`` holds.

    ``state`` is a dict as given to ``collect``, whose plain values are replaced by those of the
    checkpoint, or one model or optimizer, ``content`` then being its state. ``strict``: every key
    of ``state``, and every name of a model, must be there. What the strategy and the precision
    keep between steps is restored together with an optimizer, and left alone otherwise.

    Raises:
        CheckpointError: for what is missing or does not fit, with its place.
    """
    into = _Into(strategy, strict)
    if not isinstance(state, Mapping):
        if not _can_be_filled(state):
            raise InvalidRequest(
                f"an object of type {type(state).__name__} cannot be filled from a checkpoint; "
                "give a dict, such as {'model': model}, a model or an optimizer"
            )
        if isinstance(content, Mapping) and RESERVED in content:
            raise CheckpointError(
                f"the checkpoint holds {_keys(content, RESERVED)}, not the state of one "
                f"{type(state).__name__} alone; load it with a dict, such as {{'model': model}}"
            )
        into.fill(state, content, "")
        return {}
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"the checkpoint is of type {type(content).__name__}, not a dict with {_keys(state)}"
        )
    reserved = _check_reserved(content)
    _check_keys(state, content, strict)
    left = {key: value for key, value in content.items() if key != RESERVED}
    for key in state:
        if key in left:
            into.entry(state, key, left.pop(key), f"state[{key!r}]")
    if _holds_optimizer(state):
        # Another strategy or precision may have written nothing, which says nothing.
        if reserved.get("precision"):
            with _at(f"{RESERVED}['precision']", precision):
                precision.load_state_dict(reserved["precision"])
        if reserved.get("strategy"):
            with _at(f"{RESERVED}['strategy']", strategy):
                strategy.load_extra_state(reserved["strategy"])
    return left


def _check_reserved(content: Mapping[str, Any]) -> Mapping[str, Any]:
    reserved: Any = content.get(RESERVED, {})
    if not isinstance(reserved, Mapping) or not isinstance(reserved.get("format", 0), int):
        raise CheckpointError(
            f"the checkpoint's '{RESERVED}' is not what torchweft writes; was it saved under that "
            "name by something else?"
        )
    if reserved.get("format", 0) > _FORMAT:
        raise CheckpointError(
            f"the checkpoint is of format {reserved['format']}, and this torchweft reads up to "
            f"{_FORMAT}; it was written by a later version: pip install --upgrade torchweft"
        )
    return reserved


def _check_keys(state: Mapping[str, Any], content: Mapping[str, Any], strict: bool) -> None:
    missing = [key for key in state if key not in content]
    if strict and missing:
        near = did_you_mean(str(missing[0]), map(str, content)) if len(missing) == 1 else ""
        raise CheckpointError(
            f"the checkpoint has no {', '.join(map(repr, missing))}{near or ';'} it holds "
            f"{_keys(content, RESERVED)}. Pass strict=False to load without"
        )


def _keys(mapping: Mapping[str, Any], hidden: str = "") -> str:
    return ", ".join(repr(key) for key in mapping if key != hidden) or "nothing"


def _can_be_filled(value: Any) -> bool:
    return not isinstance(value, type) and callable(getattr(value, "load_state_dict", None))


def _parts(value: Any) -> Iterator[Any]:
    """Everything with a state in ``value``, nested containers included."""
    if _has_state(value) or _can_be_filled(value):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)


def _holds_optimizer(state: Mapping[str, Any]) -> bool:
    return any(isinstance(part, FabricOptimizer | Optimizer) for part in _parts(state))


class _Into:
    """Fills objects from what a checkpoint holds for them."""

    def __init__(self, strategy: Strategy, strict: bool) -> None:
        self._strategy = strategy
        self._strict = strict

    def entry(self, container: Any, key: Any, saved: Any, path: str) -> None:
        """Fill ``container[key]``, or replace it where it is a plain value."""
        old = container[key]
        new = self._value(old, saved, path)
        if new is old:
            return
        if not isinstance(container, MutableMapping):
            raise CheckpointError(
                f"{path} is to be replaced by the checkpoint's value, but its container is of "
                f"type {type(container).__name__}, which cannot be changed; use a dict"
            )
        container[key] = new

    def _value(self, old: Any, saved: Any, path: str) -> Any:
        if not any(True for _ in _parts(old)):
            return saved
        if _has_state(old) or _can_be_filled(old):
            self.fill(old, saved, path)
            return old
        if isinstance(old, Mapping):
            return self._mapping(old, saved, path)
        return self._sequence(old, saved, path)

    def _mapping(self, old: Mapping[Any, Any], saved: Any, path: str) -> Any:
        self._check_container(old, saved, path, isinstance(saved, Mapping))
        if self._strict and set(old) != set(saved):
            raise CheckpointError(
                f"{path} has the keys {_keys(old)}, and in the checkpoint {_keys(saved)}"
            )
        for key in old:
            if key in saved:
                self.entry(old, key, saved[key], f"{path}[{key!r}]")
        return old

    def _sequence(self, old: Any, saved: Any, path: str) -> Any:
        self._check_container(old, saved, path, isinstance(saved, list | tuple))
        if len(old) != len(saved):
            raise CheckpointError(
                f"{path} has {len(old)} items, and {len(saved)} in the checkpoint"
            )
        items = [
            self._value(item, new, f"{path}[{index}]")
            for index, (item, new) in enumerate(zip(old, saved, strict=True))
        ]
        if isinstance(old, list):
            old[:] = items
            return old
        if all(a is b for a, b in zip(items, old, strict=True)):
            return old
        return _sequence_like(old, items)

    def _check_container(self, old: Any, saved: Any, path: str, fits: bool) -> None:
        if not fits:
            raise CheckpointError(
                f"{path} is of type {type(old).__name__}, and of type {type(saved).__name__} in "
                "the checkpoint"
            )

    def fill(self, target: Any, saved: Any, path: str) -> None:
        """Give ``target`` its state."""
        with _at(path, target):
            if isinstance(target, FabricModule):
                saved = _for_model(target, saved)
                self._strategy.load_module_state(target.prepared, saved, self._strict)
            elif isinstance(target, FabricOptimizer):
                self._strategy.load_optimizer_state(target.optimizer, target.modules, saved)
            elif isinstance(target, nn.Module):
                load_named_module_state(target, _for_model(target, saved), self._strict)
            elif isinstance(target, Optimizer):
                load_named_optimizer_state(target, [], saved)
            elif not _can_be_filled(target):
                raise CheckpointError("it has state_dict() and no load_state_dict()")
            else:
                target.load_state_dict(saved)


@contextmanager
def _at(path: str, target: Any) -> Iterator[None]:
    """Says in which part of the state something went wrong."""
    try:
        yield
    except Exception as error:
        place = f"{path} ({type(target).__name__})" if path else type(target).__name__
        cause = str(error) if isinstance(error, CheckpointError) else repr(error)
        raise CheckpointError(f"cannot restore {place}: {cause}") from error


def _for_model(module: nn.Module, saved: Any) -> Any:
    """``saved`` without the prefix of a wrapper that ``module`` does not have."""
    if not isinstance(saved, Mapping):
        raise CheckpointError(
            f"the checkpoint's part is of type {type(saved).__name__}, not the state of a model"
        )
    names = [
        name for pairs in (module.named_parameters(), module.named_buffers()) for name, _ in pairs
    ]
    again = True
    while again:
        again = False
        for prefix in _WRAPPER_PREFIXES:
            if _all_start(saved, prefix) and not any(name.startswith(prefix) for name in names):
                saved = _stripped(saved, prefix)
                again = True
    return saved


def _all_start(state: Mapping[Any, Any], prefix: str) -> bool:
    return bool(state) and all(isinstance(k, str) and k.startswith(prefix) for k in state)


def _stripped(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    stripped: OrderedDict[str, Any] = OrderedDict(state)
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        stripped._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    consume_prefix_in_state_dict_if_present(stripped, prefix)
    return stripped
