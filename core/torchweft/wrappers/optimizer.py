"""The optimizer that ``fabric.setup`` returns: the user's own, stepping as the strategy does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchweft.api import Precision, Strategy
from torchweft.errors import Misuse

__all__ = ["AfterStep", "FabricOptimizer", "wrap_optimizer"]

AfterStep = Callable[[Optimizer], None]


class FabricOptimizer:
    """Mixed into a subclass of the optimizer's own class, so that ``isinstance`` holds.

    State, groups and every other attribute are those of the original at any time: schedulers that
    hold either of the two see the same numbers. Pickled, it is the original.

    Attributes:
        optimizer: the optimizer inside.
        modules: what the strategy made of the modules that own its parameters.
    """

    optimizer: Optimizer
    modules: list[nn.Module]
    __made_by: tuple[Strategy, Precision | None, AfterStep | None]
    __step: Callable[..., Any] | None
    __zero_grad: Callable[..., Any] | None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step through the strategy and the precision."""
        if self.__step is not None:
            return self.__step(self.optimizer, closure)
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients through the strategy and the precision."""
        if self.__zero_grad is not None:
            self.__zero_grad(self.optimizer, set_to_none)
        else:
            self.optimizer.zero_grad(set_to_none)

    # -- being the original ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The original's, keyed by index. Raises ``Misuse`` where its state is elsewhere."""
        self.__check_whole("state_dict()", "save")
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the original. Raises ``Misuse`` where its state is elsewhere."""
        self.__check_whole("load_state_dict(…)", "load")
        self.optimizer.load_state_dict(state_dict)

    def __check_whole(self, call: str, instead: str) -> None:
        strategy = self.__made_by[0]
        if strategy.splits_optimizer:
            name = strategy.place.plan.strategy.name
            raise Misuse(
                f"optimizer.{call} was called, and with strategy '{name}' this "
                f"{type(self.optimizer).__name__} does not hold its whole state; call "
                f"fabric.{instead}(path, {{'model': model, 'optimizer': optimizer}}) in every "
                "process"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the original."""
        self.optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        # Reached only for what neither class nor instance has: attributes of the original.
        if "optimizer" not in self.__dict__:  # while it is being made
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Schedulers put a step of theirs around the one of the optimizer that they are given.
        if name == "step":
            self.__dict__[name] = value
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            del self.__dict__[name]
        else:
            delattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"Fabric{self.optimizer!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy that leaves this process has no strategy to step with; it is a plain optimizer.
        return _itself, (self.optimizer,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        inside = copy.deepcopy(self.optimizer, memo)
        # Copied together with its model, it steps the copy of the model.
        modules = [memo.get(id(module), module) for module in self.modules]
        strategy, precision, after_step = self.__made_by
        return wrap_optimizer(inside, strategy, modules, precision, after_step)

    @classmethod
    def _of(
        cls,
        optimizer: Optimizer,
        strategy: Strategy,
        modules: list[nn.Module],
        precision: Precision | None,
        after_step: AfterStep | None,
    ) -> Any:
        # Not made by the constructor: a subclass may take any arguments.
        wrapped = object.__new__(cls)
        own = wrapped.__dict__
        own["optimizer"] = optimizer
        own["modules"] = modules
        own["_FabricOptimizer__made_by"] = (strategy, precision, after_step)
        # Looked up once, and what nobody overrides is left out: a step consists of few calls, and
        # each one more can be measured.
        step = _unless_plain(strategy, precision, "step")
        own["_FabricOptimizer__step"] = step if after_step is None else _followed(step, after_step)
        own["_FabricOptimizer__zero_grad"] = _unless_plain(strategy, precision, "zero_grad")
        return wrapped


def _unless_plain(
    strategy: Strategy, precision: Precision | None, name: str
) -> Callable[..., Any] | None:
    """What strategy and precision do in that method; None where it is the optimizer's own."""
    if getattr(type(strategy), name) is not getattr(Strategy, name) or precision is None:
        return getattr(strategy, name)  # type: ignore[no-any-return]
    if getattr(type(precision), name) is not getattr(Precision, name):
        return getattr(precision, name)  # type: ignore[no-any-return]
    return None


def _followed(step: Callable[..., Any] | None, after_step: AfterStep) -> Callable[..., Any]:
    def stepping(optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        if step is not None:
            result = step(optimizer, closure)
        else:
            result = optimizer.step() if closure is None else optimizer.step(closure)
        after_step(optimizer)
        return result

    return stepping


def _itself(optimizer: Optimizer) -> Optimizer:
    return optimizer


def wrap_optimizer(
    optimizer: Optimizer,
    strategy: Strategy,
    modules: Sequence[nn.Module],
    precision: Precision | None = None,
    after_step: AfterStep | None = None,
) -> Any:
    """A ``FabricOptimizer`` that is also an instance of the optimizer's class.

    ``precision``: the one that ``strategy`` started with; None asks the strategy in every step.
    ``after_step``: called with the optimizer after every step.
    """
    cls = type(optimizer)
    members = {name: _forwarded(name) for name in _data_of(optimizer)}
    wrapped_class: Any = type(
        f"Fabric{cls.__name__}", (FabricOptimizer, cls), {**members, "__doc__": cls.__doc__}
    )
    return wrapped_class._of(optimizer, strategy, list(modules), precision, after_step)


def _data_of(optimizer: Optimizer) -> set[str]:
    """Names of data that would be found in the class before the original is asked for it."""
    names = {name for name in vars(optimizer) if hasattr(type(optimizer), name)}
    for cls in type(optimizer).__mro__:
        if issubclass(cls, Optimizer) and cls is not Optimizer:
            names.update(name for name, value in vars(cls).items() if _is_data(name, value))
    return names - {"step"}


def _is_data(name: str, value: Any) -> bool:
    return not (name.startswith("__") or callable(value) or hasattr(value, "__get__"))


def _forwarded(name: str) -> Any:
    # A property, which takes precedence over the class's own attribute of that name.
    return property(
        lambda self: getattr(self.optimizer, name),
        lambda self, value: setattr(self.optimizer, name, value),
    )
