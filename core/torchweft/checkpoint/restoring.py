"""What a checkpoint holds, put back into the user's objects."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.optim import Optimizer

from torchweft.api import Precision, Strategy
from torchweft.api.state import (
    load_named_module_state,
    load_named_optimizer_state,
    named_module_state,
    parameter_names,
)
from torchweft.checkpoint.layouts import LaidOut, load_pair
from torchweft.checkpoint.nesting import has_state, key_list, sequence_like
from torchweft.checkpoint.state import FORMAT, RESERVED
from torchweft.errors import CheckpointError, InvalidRequest, did_you_mean
from torchweft.wrappers import FabricModule, FabricOptimizer

__all__ = ["Source", "restore"]

# What raw state dictionaries of wrapped models have before every name.
_WRAPPER_PREFIXES = ("module.", "_forward_module.")


class Source:
    """Where a checkpoint's tensors come from: by default they are in its content already.

    A source of another kind has stand-ins in the content, and gets the tensors for them, or tensors
    that are still in a file.
    """

    def whole(self, value: Any) -> Any:
        """``value`` with its tensors, whole and in the memory of the CPU."""
        return value

    def unused(self, value: Any) -> Any:
        """``value`` with its tensors, whole and on the CPU, of which few may be needed."""
        return self.whole(value)

    def stored_at(self, tensor: Tensor) -> Any:
        """Equal for two tensors of the content that are stored as one."""
        if tensor.is_meta or not tensor.numel() or tensor.layout != torch.strided:
            return id(tensor)
        storage = tensor.untyped_storage().data_ptr()
        where = (storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        return (*where, tensor.dtype)

    def for_model(self, own: Callable[[], Iterable[tuple[str, Any]]], saved: Any) -> Any:
        """The state of a model, tensors split as those are that it has itself."""
        return saved

    def for_optimizer(self, own: Callable[[], Mapping[Any, Tensor]], saved: Any) -> Any:
        """The state of an optimizer, tensors split as the parameters are that they belong to."""
        return saved

    def settle(self, optimizer: Optimizer, saved: Any) -> None:
        """Called when ``saved`` was loaded: what the optimizer kept of it becomes its own."""


def restore(
    content: Any,
    state: Any,
    *,
    strategy: Strategy,
    precision: Precision,
    strict: bool = True,
    source: Source | None = None,
) -> dict[str, Any]:
    """Fill what ``state`` holds in place, and return what else ``content`` holds.

    ``state`` is a dict as given to ``collect``, whose plain values are replaced by those of the
    checkpoint, or one model or optimizer, ``content`` then being its state. ``strict``: every key
    of ``state``, and every name of a model, must be there. ``source`` has the tensors. What the
    strategy and the precision keep between steps is restored together with an optimizer, and left
    alone otherwise.

    Raises:
        CheckpointError: for what is missing or does not fit, with its place.
    """
    source = source or Source()
    into = _Into(strategy, strict, source)
    if not isinstance(state, Mapping):
        if not _can_be_filled(state):
            raise InvalidRequest(
                f"an object of type {type(state).__name__} cannot be filled from a checkpoint; "
                "give a dict, such as {'model': model}, a model or an optimizer"
            )
        if isinstance(content, Mapping) and RESERVED in content:
            raise CheckpointError(
                f"the checkpoint holds {key_list(content, RESERVED)}, not the state of one "
                f"{type(state).__name__} alone; load it with a dict, such as {{'model': model}}"
            )
        into.fill(state, content, "")
        return {}
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"the checkpoint is of type {type(content).__name__}, not a dict with {key_list(state)}"
        )
    reserved = _check_reserved(content)
    _check_keys(state, content, strict)
    left = {key: value for key, value in content.items() if key != RESERVED}
    for key in state:
        if key in left:
            into.entry(state, key, left.pop(key), f"state[{key!r}]")
    into.finish()
    if _holds_optimizer(state):
        # Another strategy or precision may have written nothing, which says nothing.
        if reserved.get("precision"):
            with _at(f"{RESERVED}['precision']", precision):
                precision.load_state_dict(source.whole(reserved["precision"]))
        if reserved.get("strategy"):
            with _at(f"{RESERVED}['strategy']", strategy):
                strategy.load_extra_state(source.whole(reserved["strategy"]))
    return {key: source.unused(value) for key, value in left.items()}


def _check_reserved(content: Mapping[str, Any]) -> Mapping[str, Any]:
    reserved: Any = content.get(RESERVED, {})
    if not isinstance(reserved, Mapping) or not isinstance(reserved.get("format", 0), int):
        raise CheckpointError(
            f"the checkpoint's '{RESERVED}' is not what torchweft writes; was it saved under that "
            "name by something else?"
        )
    if reserved.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"the checkpoint is of format {reserved['format']}, and this torchweft reads up to "
            f"{FORMAT}; it was written by a later version: pip install --upgrade torchweft"
        )
    return reserved


def _check_keys(state: Mapping[str, Any], content: Mapping[str, Any], strict: bool) -> None:
    missing = [key for key in state if key not in content]
    if strict and missing:
        near = did_you_mean(str(missing[0]), map(str, content)) if len(missing) == 1 else ""
        raise CheckpointError(
            f"the checkpoint has no {', '.join(map(repr, missing))}{near or ';'} it holds "
            f"{key_list(content, RESERVED)}. Pass strict=False to load without"
        )


def _can_be_filled(value: Any) -> bool:
    return not isinstance(value, type) and callable(getattr(value, "load_state_dict", None))


def _parts(value: Any) -> Iterator[Any]:
    """Everything with a state in ``value``, nested containers included."""
    if has_state(value) or _can_be_filled(value):
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

    def __init__(self, strategy: Strategy, strict: bool, source: Source) -> None:
        self._strategy = strategy
        self._strict = strict
        self._source = source
        self._laid_out: dict[str, tuple[LaidOut, dict[str, tuple[Any, str]]]] = {}

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
            return self._source.whole(saved)
        if has_state(old) or _can_be_filled(old):
            self.fill(old, saved, path)
            return old
        if isinstance(old, Mapping):
            return self._mapping(old, saved, path)
        return self._sequence(old, saved, path)

    def _mapping(self, old: Mapping[Any, Any], saved: Any, path: str) -> Any:
        self._check_container(old, saved, path, isinstance(saved, Mapping))
        if self._strict and set(old) != set(saved):
            raise CheckpointError(
                f"{path} has the keys {key_list(old)}, and in the checkpoint {key_list(saved)}"
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
        return sequence_like(old, items)

    def _check_container(self, old: Any, saved: Any, path: str, fits: bool) -> None:
        if not fits:
            raise CheckpointError(
                f"{path} is of type {type(old).__name__}, and of type {type(saved).__name__} in "
                "the checkpoint"
            )

    def fill(self, target: Any, saved: Any, path: str) -> None:
        """Give ``target`` its state; ``finish``, that of one that comes with another."""
        if isinstance(saved, LaidOut):
            self._laid_out.setdefault(saved.folder, (saved, {}))[1][saved.kind] = target, path
            return
        with _at(path, target):
            if isinstance(target, FabricModule):
                strategy, prepared = self._strategy, target.prepared
                saved = _for_model(target, saved)
                saved = self._source.for_model(lambda: strategy.module_state(prepared), saved)
                strategy.load_module_state(prepared, saved, self._strict)
            elif isinstance(target, FabricOptimizer):
                saved = self._source.for_optimizer(lambda: self._parameters(target), saved)
                self._strategy.load_optimizer_state(target.optimizer, target.modules, saved)
                self._source.settle(target.optimizer, saved)
            elif isinstance(target, nn.Module):
                saved = _for_model(target, saved)
                saved = self._source.for_model(lambda: named_module_state(target), saved)
                load_named_module_state(target, saved, self._strict)
            elif isinstance(target, Optimizer):
                saved = self._source.for_optimizer(lambda: _by_index(target), saved)
                load_named_optimizer_state(target, [], saved)
                self._source.settle(target, saved)
            elif not _can_be_filled(target):
                raise CheckpointError("it has state_dict() and no load_state_dict()")
            else:
                target.load_state_dict(self._source.whole(saved))

    def finish(self) -> None:
        """Fill models and optimizers that are in a strategy's own layout, each pair at once."""
        for found, targets in self._laid_out.values():
            target, path = targets.get("model") or targets["optimizer"]
            with _at(path, target):
                load_pair(self._strategy, found, targets.get("model"), targets.get("optimizer"))

    def _parameters(self, optimizer: FabricOptimizer) -> dict[Any, Tensor]:
        """An optimizer's parameters, by name and by index."""
        names = parameter_names([self._strategy.original(each) for each in optimizer.modules])
        by_index: dict[Any, Tensor] = _by_index(optimizer.optimizer)
        by_name = {names[id(p)]: p for p in by_index.values() if id(p) in names}
        return {**by_index, **by_name}


def _by_index(optimizer: Optimizer) -> dict[Any, Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return dict(enumerate(parameters))


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
