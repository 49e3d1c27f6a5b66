"""Listening to what is done to tensors of the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode, handle_torch_function, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from torchweft.api.deferred.tape import (
    DRAWING,
    META,
    Memory,
    Tape,
    View,
    name_of,
    on_meta,
    tensors_in,
    written_by,
)
from torchweft.errors import Misuse

__all__ = ["Functions", "Operations", "overridable_truncated_normal", "registered"]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations on tensors of the meta device."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape
        self.own = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler, a second or more, to keep it away from here.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch's own Python code for the meta device is not what the user calls.
        with torch._C.DisableTorchFunction():
            before = {id(t): View.of(t) for t in tensors_in((args, kwargs)) if on_meta(t)}
            if before and name_of(func) in DRAWING:
                # Nothing would be done, but torch's compiler imported to do it.
                out = args[0]
            else:
                out = self._shaped(func, args, kwargs, bool(before))
            if before or any(on_meta(t) for t in tensors_in(out)):
                written = written_by(func, args, kwargs)
                self._tape.note(func, args, kwargs, before, written, out, self.own)
        return out

    @staticmethod
    def _shaped(func: Any, args: Any, kwargs: Any, meta: bool) -> Any:
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            # The host takes its own tensors among those of the model, and so it does here.
            if not meta or written_by(func, args, kwargs, hosts=True):
                raise
            return func(*tree_map(_as_meta, args), **tree_map(_as_meta, kwargs))


def _as_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) else value


class Functions(TorchFunctionMode):
    """Keeps what operations on the meta device would lose: values from Python and to Python."""

    def __init__(self, tape: Tape, operations: Operations) -> None:
        super().__init__()
        self._tape = tape
        self._operations = operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch.nn.init does nothing to what it finds on the meta device.
        if func == _IS_META and self._tape.knows(args[0]):
            return False
        if func is _TRUNCATED_NORMAL and on_meta(args[0]):
            with torch._C.DisableTorchFunction():
                self._tape.note(
                    func, args, kwargs, {id(args[0]): View.of(args[0])}, [args[0]], args[0]
                )
            return args[0]
        if func in _FROM_HOST and kwargs.get("device") in (None, "meta", META):
            there = [tensor for tensor in tensors_in((args, kwargs)) if on_meta(tensor)]
            on_host = {**kwargs, "device": "cpu"}
            if not there:
                return self._constant(func(*args, **on_host), own=func is torch.tensor)
            if not any(each is there[0] for each in (*args, *kwargs.values())):
                return self._answer(func, args, on_host, there)
        if func is Tensor.new_tensor and self._tape.knows(args[0]):
            kwargs = {"dtype": args[0].dtype, **kwargs}
            return self.__torch_function__(torch.tensor, types, args[1:], kwargs)
        if func in _INDEXING:
            args = (args[0], self._index(args[1]), *args[2:])
        try:
            return func(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            tensors = [t for t in tensors_in((args, kwargs)) if on_meta(t)]
            if "meta" not in str(error).lower() or not tensors:
                raise
            return self._answer(func, args, kwargs, tensors)

    def _constant(self, real: Tensor, own: bool = True) -> Tensor:
        self._operations.own = own
        try:
            return real.detach().to(META).requires_grad_(real.requires_grad)
        finally:
            self._operations.own = False

    def _index(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(map(self._index, index))
        return self._constant(torch.tensor(index, device="cpu")) if _is_array(index) else index

    def _answer(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What a function says to the values that its arguments have."""
        views = {id(tensor): View.of(tensor) for tensor in tensors}
        storages = {view.storage for view in views.values()}
        if not all(map(self._tape.knows, tensors)):
            raise _unanswered(func, "it was made on the meta device elsewhere, without one")
        if self._tape.is_random(storages):
            raise _unanswered(func, "that hangs on random numbers, which are drawn later")
        reals: dict[int, Tensor] = {}

        def deliver(storage: int, memory: Memory) -> None:
            found = {key: view for key, view in views.items() if view.storage == storage}
            reals.update({key: memory.tensor(view) for key, view in found.items()})

        self._tape.replay(list(storages), torch.device("cpu"), deliver, draws=False)
        args, kwargs = tree_map(lambda each: reals.get(id(each), each), (args, kwargs))
        versions = [real._version for real in reals.values()]
        out = func(*args, **kwargs)
        if versions != [real._version for real in reals.values()]:
            raise _unanswered(func, "what is done to it in the same call would be lost")
        if func in _TO_HOST:
            return out
        return tree_map(lambda t: self._constant(t) if isinstance(t, Tensor) else t, out)


def _is_array(index: Any) -> bool:
    return isinstance(index, list | np.ndarray) and not tensors_in(index)


def _unanswered(func: Any, why: str) -> Misuse:
    return Misuse(
        "a model made under fabric.init_module() asks for the value of a tensor in its "
        f"constructor ({resolve_name(func) or func}), and {why}; make that tensor with "
        "device='cpu', or build the model without init_module()"
    )


_IS_META: Any = vars(torch._C.TensorBase)["is_meta"].__get__
_FROM_HOST = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
_INDEXING = frozenset({Tensor.__getitem__, Tensor.__setitem__})
_TO_HOST = frozenset({Tensor.cpu, Tensor.to})
# Draws until all numbers fit, which no tape could hold: it is recorded as one operation.
_TRUNCATED_NORMAL: Any = nn.init._no_grad_trunc_normal_


@contextmanager
def overridable_truncated_normal() -> Iterator[None]:
    """Let modes see what ``torch.nn.init.trunc_normal_`` does, as they see most of its kind."""

    def overridable(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return handle_torch_function(_TRUNCATED_NORMAL, (tensor,), tensor, *args, **kwargs)

    init: Any = nn.init
    init._no_grad_trunc_normal_ = overridable
    try:
        yield
    finally:
        init._no_grad_trunc_normal_ = _TRUNCATED_NORMAL


@contextmanager
def registered(modules: Any) -> Iterator[None]:
    """Collect the modules into which something is registered, and those that are."""

    def note(module: nn.Module, name: str, what: Any) -> None:
        modules[module] = None
        if isinstance(what, nn.Module):
            modules[what] = None

    handles = [
        hooks.register_module_parameter_registration_hook(note),
        hooks.register_module_buffer_registration_hook(note),
        hooks.register_module_module_registration_hook(note),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
