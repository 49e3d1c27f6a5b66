"""The module that ``fabric.setup`` returns: the user's own, with strategy and precision around."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from torchweft.api import Precision, Strategy, map_leaves
from torchweft.errors import InvalidRequest, Misuse

__all__ = ["FabricModule", "split_compiled"]


class FabricModule(nn.Module):
    """Behaves as the module it was made from, and trains as the strategy does.

    Every attribute and method is that of the original module, with its names, and setting one
    sets it there; calling it goes through precision and strategy. Pickled, it is the original
    module. A deep copy is set up as the original was, but for what a strategy put around it: where
    gradients would not be synchronised, ``backward`` through the copy is an error.

    Attributes:
        prepared: what the strategy made of the module; given to the strategy's methods.
    """

    prepared: nn.Module
    __original: nn.Module
    __made_by: tuple[Strategy, Precision, list[bool]]
    __run: Callable[..., Any]
    __guard: _BackwardGuard | None
    __marked: dict[str, Callable[..., Any]]

    def __new__(cls, original: nn.Module, *args: Any, **kwargs: Any) -> FabricModule:
        """A container of modules where the original is one."""
        # Python looks for these in the class alone, and some mean something by being there.
        found = [name for name in _CONTAINER if hasattr(type(original), name)]
        members = {name: _delegated(name, type(original)) for name in found}
        made: FabricModule = object.__new__(type(cls.__name__, (cls,), members) if found else cls)
        return made

    # nn.Module's constructor is not called: all that it would set is looked up in the original.
    def __init__(
        self,
        original: nn.Module,
        prepared: nn.Module,
        strategy: Strategy,
        precision: Precision,
        backward_open: list[bool],
        call: Callable[..., Any] | None = None,
    ) -> None:
        """Put everything around ``original`` that a call needs, looked up once.

        Args:
            original: the module as the user wrote it.
            prepared: what the strategy made of it.
            strategy: the strategy that prepared it.
            precision: surrounds every call.
            backward_open: one cell, shared with the Fabric, which is true during
                ``fabric.backward()``.
            call: what is called in place of ``prepared``, such as a compiled form of it.
        """
        own = self.__dict__
        own["prepared"] = prepared
        own["_FabricModule__original"] = original
        own["_FabricModule__marked"] = {}
        own["_FabricModule__made_by"] = (strategy, precision, backward_open)
        guard = None
        if strategy.owns_backward or precision.scales_loss:
            guard = _BackwardGuard(original, backward_open, _wrong_backward(strategy, precision))
        own["_FabricModule__guard"] = guard
        own["_FabricModule__run"] = _route(prepared if call is None else call, precision, guard)

    @property
    def module(self) -> nn.Module:
        """The original module."""
        return self.__original

    # -- calling ---------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` under precision and strategy."""
        return self.__run(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling the module."""
        return self.__run(*args, **kwargs)

    def mark_forward_method(self, method: str | Callable[..., Any]) -> None:
        """Have another method than ``forward`` go through precision and strategy too.

        ``method`` is its name, or the method itself. Raises ``InvalidRequest`` when the module
        has none of that name.
        """
        name = method if isinstance(method, str) else str(getattr(method, "__name__", method))
        if not callable(getattr(self.__original, name, None)):
            raise InvalidRequest(
                f"mark_forward_method({name!r}): {type(self.__original).__name__} has no method "
                "of that name"
            )
        if name != "forward":
            strategy, precision, _ = self.__made_by
            through = strategy.forward_method(self.prepared, name)
            self.__marked[name] = _route(through, precision, self.__guard)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what a call runs, in place; arguments are those of ``torch.compile``."""
        self.prepared.compile(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the original module. Raises ``Misuse`` where this process holds parts alone."""
        self.__check_whole("state_dict()", "save")
        return self.__original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the original module. Raises ``Misuse`` where this process holds parts alone."""
        self.__check_whole("load_state_dict(…)", "load")
        return self.__original.load_state_dict(*args, **kwargs)

    def __check_whole(self, call: str, instead: str) -> None:
        strategy = self.__made_by[0]
        if strategy.splits_parameters:
            name = strategy.place.plan.strategy.name
            raise Misuse(
                f"model.{call} was called, and with strategy '{name}' this process holds parts of "
                f"the parameters alone; call fabric.{instead}(path, {{'model': model}}) in every "
                "process"
            )

    # -- being the original ----------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if "_FabricModule__original" not in own:  # while it is being made
            raise AttributeError(name)
        if name in own["_FabricModule__marked"]:
            return own["_FabricModule__marked"][name]
        original: nn.Module = own["_FabricModule__original"]
        try:
            value: Any = getattr(original, name)
        except AttributeError:
            if name == "device":
                return own["_FabricModule__made_by"][0].place.device
            raise
        if own["prepared"] is not original and inspect.ismethod(value):
            return _Bypass(original, value) if value.__self__ is original else value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__original, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *dir(self.__original)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__original!r})"

    def train(self, mode: bool = True) -> FabricModule:
        """Set training mode on what is called, and so on the original inside."""
        self.prepared.train(mode)
        self.__original.train(mode)
        return self

    def eval(self) -> FabricModule:
        """Set evaluation mode."""
        return self.train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FabricModule:
        strategy, precision, backward_open = self.__made_by
        inside = copy.deepcopy(self.__original, memo)
        copied = FabricModule(inside, inside, strategy, precision, backward_open)
        if self.prepared is not self.__original:
            guard = _BackwardGuard(inside, [False], _unsynchronised_copy(strategy))
            copied.__dict__["_FabricModule__guard"] = guard
            copied.__dict__["_FabricModule__run"] = _route(inside, precision, guard)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy that leaves this process has no strategy to run with; it is a plain module.
        return _itself, (self.__original,)


def _itself(module: nn.Module) -> nn.Module:
    return module


def _delegated(name: str, kind: type = nn.Module) -> Callable[..., Any]:
    @functools.wraps(getattr(kind, name))
    def method(self: FabricModule, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.module, name)(*args, **kwargs)
        return self if result is self.module else result

    return method


# What makes a module a sequence or a mapping of others.
_CONTAINER = ("__len__", "__iter__", "__contains__", "__getitem__", "__setitem__", "__delitem__")

# What nn.Module would do with its own registries is done with the original's.
for _name, _member in list(vars(nn.Module).items()):
    if callable(_member) and not _name.startswith("__") and _name not in vars(FabricModule):
        setattr(FabricModule, _name, _delegated(_name))


# -- what a call does ----------------------------------------------------------------------------


def _route(
    call: Callable[..., Any], precision: Precision, guard: _BackwardGuard | None
) -> Callable[..., Any]:
    """What a call does, settled once: what the precision does not override costs nothing."""
    kind = type(precision)
    convert_input = convert_output = context = None
    if kind.convert_input is not Precision.convert_input:
        convert_input = precision.convert_input
    if kind.convert_output is not Precision.convert_output:
        convert_output = precision.convert_output
    if kind.forward_context is not Precision.forward_context:
        context = precision.forward_context
    if all(part is None for part in (convert_input, convert_output, context, guard)):
        return call

    # One function for all of it: in a step of few calls, each one more can be measured.
    def run(*args: Any, **kwargs: Any) -> Any:
        if convert_input is not None:
            args = convert_input(args)
            kwargs = convert_input(kwargs)
        if context is None:
            output = call(*args, **kwargs)
        else:
            with context():
                output = call(*args, **kwargs)
        if convert_output is not None:
            output = convert_output(output)
        return output if guard is None else guard.watch(output)

    return run


def split_compiled(module: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """The module inside torch.compile's wrapper, and what compiles another one the same way.

    A module that was not compiled, and a function that returns its argument.
    """
    # Whatever was compiled has imported this; importing it to ask would take a second.
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or not isinstance(module, dynamo.OptimizedModule):
        return module, _itself
    compiled: Any = module

    def compile_again(prepared: nn.Module) -> Any:
        if prepared is compiled._orig_mod:
            return compiled
        return dynamo.OptimizedModule(prepared, compiled.dynamo_ctx)

    return compiled._orig_mod, compile_again


# -- what goes past it ---------------------------------------------------------------------------


class _BackwardGuard:
    """Raises when gradients reach the parameters of a module by ``loss.backward()``."""

    def __init__(self, module: nn.Module, opened: list[bool], message: str) -> None:
        self._module = module
        self._opened = opened
        self._message = message
        self._armed: list[Any] = []

    def watch(self, output: Any) -> Any:
        """Notice every backward through tensors in ``output``; returns it."""
        while self._armed:
            self._armed.pop().remove()
        map_leaves(output, self._attach)
        return output

    def _attach(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
            leaf.register_hook(self._passed)  # type: ignore[no-untyped-call]
        return leaf

    def _passed(self, gradient: Tensor) -> None:
        # torch.autograd.grad comes by here too and may. What it does not do is accumulate.
        if not self._opened[0] and not self._armed:
            parameters: list[Any] = [p for p in self._module.parameters() if p.requires_grad]
            self._armed = [
                parameter.register_post_accumulate_grad_hook(self._accumulated)
                for parameter in parameters
            ]

    def _accumulated(self, parameter: Tensor) -> None:
        if not self._opened[0]:
            raise Misuse(self._message)


def _wrong_backward(strategy: Strategy, precision: Precision) -> str:
    plan = strategy.place.plan
    if strategy.owns_backward:
        who = f"strategy '{plan.strategy.name}' needs"
    else:
        who = f"precision '{plan.precision.name}', which scales the loss, needs"
    return (
        f"loss.backward() was called, but {who} fabric.backward(loss) in its place; change that "
        "line"
    )


def _unsynchronised_copy(strategy: Strategy) -> str:
    return (
        f"this model is a copy of one that strategy '{strategy.place.plan.strategy.name}' "
        "prepared, and the gradients of a copy are not synchronised between processes; to train "
        "it, set it up: fabric.setup(model.module, optimizer); to keep it as it is, run it under "
        "torch.no_grad() or call requires_grad_(False)"
    )


class _Bypass:
    """A method of the original, which must not run the parts of a module that was wrapped."""

    def __init__(self, original: nn.Module, method: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)
        self._original = original
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._method(*args, **kwargs)
        with ExitStack() as stack:
            for module in self._original.modules():
                stack.enter_context(module.register_forward_pre_hook(self._check))
            return self._method(*args, **kwargs)

    def _check(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            name = getattr(self._method, "__name__", "?")
            raise Misuse(
                f"{type(self._original).__name__}.{name}() runs {type(module).__name__} past the "
                "strategy, which synchronises gradients in forward() alone; call "
                f"model.mark_forward_method({name!r}) after fabric.setup(), or run it under "
                "torch.no_grad()"
            )
