"""The optimizer that ``fabric.setup`` returns: the user's own, stepping as the strategy does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchweft.api import Strategy

__all__ = ["FabricOptimizer", "wrap_optimizer"]


class FabricOptimizer:
    """Mixed into a subclass of the optimizer's own class, so that ``isinstance`` holds.

    State and groups are those of the original at any time: schedulers that hold either of the
    two see the same numbers.

    Attributes:
        optimizer: the optimizer inside.
        strategy: the strategy that steps it.
        modules: what the strategy made of the modules that own its parameters.
    """

    optimizer: Optimizer
    strategy: Strategy
    modules: list[nn.Module]

    # Properties take precedence over the instance's dictionary, into which torch's own methods
    # (add_param_group, __setstate__) would otherwise write a copy.
    @property
    def state(self) -> Any:
        """State by parameter."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups with their hyperparameters."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """Default hyperparameters."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        # Reached only for what neither class nor instance has: attributes of the original.
        if name in ("optimizer", "strategy", "modules", "_step", "_zero_grad"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step through the strategy and the precision."""
        return self._step(self.optimizer, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients through the strategy."""
        self._zero_grad(self.optimizer, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The original's, which is keyed by index."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the original."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the original."""
        self.optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"Fabric{self.optimizer!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy that left this process has no strategy to step with; it is a plain optimizer.
        return _itself, (self.optimizer,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        inside = copy.deepcopy(self.optimizer, memo)
        return wrap_optimizer(inside, self.strategy, self.modules)


def _itself(optimizer: Optimizer) -> Optimizer:
    return optimizer


def wrap_optimizer(
    optimizer: Optimizer, strategy: Strategy, modules: Sequence[nn.Module]
) -> FabricOptimizer:
    """A ``FabricOptimizer`` that is also an instance of the optimizer's class."""
    cls = type(optimizer)
    wrapped_class = type(f"Fabric{cls.__name__}", (FabricOptimizer, cls), {"__doc__": cls.__doc__})
    wrapped: FabricOptimizer = object.__new__(wrapped_class)
    wrapped.optimizer = optimizer
    wrapped.strategy = strategy
    wrapped.modules = list(modules)
    # Bound once: a step looks nothing up that setup could settle.
    wrapped._step = strategy.step  # type: ignore[attr-defined]
    wrapped._zero_grad = strategy.zero_grad  # type: ignore[attr-defined]
    return wrapped
