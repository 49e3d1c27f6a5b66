"""The module that ``fabric.setup`` returns: the user's own, with strategy and precision around."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torchweft.api import Precision, Strategy, map_leaves
from torchweft.errors import Misuse

__all__ = ["FabricModule"]


class FabricModule(nn.Module):
    """Behaves as the module it was made from, and trains as the strategy does.

    Attribute access, ``state_dict``, ``parameters`` and the like are those of the original
    module, with its names. Calling it goes through precision and strategy.

    Attributes:
        prepared: what the strategy made of the module; given to the strategy's methods.
        strategy: the strategy that prepared it.
    """

    prepared: nn.Module
    strategy: Strategy

    def __init__(
        self,
        original: nn.Module,
        prepared: nn.Module,
        strategy: Strategy,
        precision: Precision,
        backward_open: list[bool],
    ) -> None:
        super().__init__()
        # Past nn.Module's registration: the children of this module are those of the original.
        own = self.__dict__
        own["_original"] = original
        own["prepared"] = prepared
        own["strategy"] = strategy
        own["_precision"] = precision
        own["_guard"] = strategy.owns_backward or precision.scales_loss
        # One cell, shared with the Fabric, which opens it for the time of fabric.backward().
        own["_backward_open"] = backward_open
        own["_run"] = _route(prepared, precision)

    @property
    def module(self) -> nn.Module:
        """The original module."""
        original: nn.Module = self._original
        return original

    # -- calling ---------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` under precision and strategy."""
        if self._guard:
            return self._guarded(self._run(*args, **kwargs))
        return self._run(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling the module."""
        return self(*args, **kwargs)

    def _guarded(self, output: Any) -> Any:
        """Make ``loss.backward()`` an error where only ``fabric.backward(loss)`` is right."""
        opened = self._backward_open

        def check(gradient: Tensor) -> None:
            if not opened[0]:
                raise Misuse(
                    "loss.backward() was called, but "
                    f"{_who_needs_it(self.strategy, self._precision)} needs "
                    "fabric.backward(loss) in its place; change that line"
                )

        def attach(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(check)
            return leaf

        map_leaves(output, attach)
        return output

    # -- being the original ----------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and name != "training":
            self.__dict__[name] = value
        else:
            setattr(self.__dict__["_original"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._original, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._original)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._original!r})"

    def train(self, mode: bool = True) -> FabricModule:
        """Set training mode on what is called, and so on the original inside."""
        self.prepared.train(mode)
        self._original.train(mode)
        self.__dict__["training"] = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What this process holds, by the original names; never communicates."""
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Fill the original module."""
        return self._original.load_state_dict(state_dict, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FabricModule:
        self._original._apply(fn, recurse)
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the original, by its names."""
        return self._original.named_parameters(*args, **kwargs)  # type: ignore[no-any-return]

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Those of the original, by its names."""
        return self._original.named_buffers(*args, **kwargs)  # type: ignore[no-any-return]

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Those of the original, by its names."""
        return self._original.named_modules(*args, **kwargs)  # type: ignore[no-any-return]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Those of the original, by its names."""
        return self._original.named_children()  # type: ignore[no-any-return]

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the original module, which is what runs."""
        return self._original.register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the original module, which is what runs."""
        return self._original.register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the original module, which is what runs."""
        return self._original.register_full_backward_hook(*args, **kwargs)


def _route(prepared: nn.Module, precision: Precision) -> Callable[..., Any]:
    """What a call does, settled once: what the precision does not override costs nothing."""
    kind = type(precision)
    converts_input = kind.convert_input is not Precision.convert_input
    converts_output = kind.convert_output is not Precision.convert_output
    has_context = kind.forward_context is not Precision.forward_context
    if not (converts_input or converts_output or has_context):
        return prepared

    convert_input, convert_output = precision.convert_input, precision.convert_output
    context = precision.forward_context

    def run(*args: Any, **kwargs: Any) -> Any:
        if converts_input:
            args = convert_input(args)
            kwargs = convert_input(kwargs)
        with context():
            output = prepared(*args, **kwargs)
        return convert_output(output) if converts_output else output

    return run


def _who_needs_it(strategy: Strategy, precision: Precision) -> str:
    if strategy.owns_backward:
        return f"the strategy '{strategy.place.plan.strategy.name}'"
    return f"the precision '{strategy.place.plan.precision.name}', which scales the loss,"

