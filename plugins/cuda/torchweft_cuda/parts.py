"""Choosing modules of a model: by names of classes, by classes, by a function, or by size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from torchweft.errors import InvalidRequest, did_you_mean

__all__ = ["Choice", "checked", "choose", "unshared"]

#: What an option that chooses modules takes.
Choice = str | Callable[[nn.Module], bool] | type[nn.Module] | Iterable[type[nn.Module]] | None

#: Parameters that ``"auto"`` gathers at once at most, whatever the model's size.
_MOST = 1_000_000_000


def checked(option: str, value: Any) -> Any:
    """The value of an option, classes as a tuple. Raises ``InvalidRequest`` for what is none."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, type):
        return (value,)
    if callable(value):
        return value
    classes = tuple(value) if isinstance(value, Iterable) else ()
    if classes and all(isinstance(each, type) for each in classes):
        return classes
    raise InvalidRequest(
        f"strategy 'fsdp' was given {option}={value!r}; it takes names of classes joined by '+', "
        f"such as {option}=Block+Embedding, classes of modules, or a function of a module"
    )


def choose(module: nn.Module, option: str, value: Any) -> list[nn.Module]:
    """The modules inside of ``module`` that a checked value chooses, inner ones first.

    Raises ``InvalidRequest`` where it chooses none.
    """
    if value is None:
        return []
    inner = [each for each in module.modules() if each is not module]
    if option == "policy" and value == "auto":
        by_size = {id(each) for each in _by_size(module)}
        return [each for each in reversed(inner) if id(each) in by_size]
    chooses = _chooser(value)
    chosen = [each for each in reversed(inner) if chooses(each)]
    if not chosen:
        classes = sorted({type(each).__name__ for each in inner})
        near = did_you_mean(value, classes) if isinstance(value, str) else ""
        there = (
            f"its modules are of the classes {', '.join(classes)}" if inner else "it has no modules"
        )
        raise InvalidRequest(
            f"strategy 'fsdp' was given {option}={_spelt(value)}, which chooses no part of "
            f"{type(module).__name__}{near or ';'} {there}"
        )
    return chosen


def _spelt(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(each.__name__ for each in value)
    return value if isinstance(value, str) else getattr(value, "__name__", repr(value))


def _chooser(value: Any) -> Callable[[nn.Module], bool]:
    if isinstance(value, str):
        names = {name.strip() for name in value.split("+")}
        return lambda module: type(module).__name__ in names
    if isinstance(value, tuple):
        return lambda module: isinstance(module, value)
    function: Callable[[nn.Module], bool] = value
    return function


def _by_size(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that hold no more than a quarter of all parameters.

    A larger one without modules inside is taken as it is; what holds less than a thousandth is
    left to be gathered with what surrounds it.
    """
    total = _count(module)
    most, least = min(total / 4, _MOST), total / 1000
    chosen: list[nn.Module] = []

    def visit(parent: nn.Module) -> None:
        for child in parent.children():
            size = _count(child)
            if size < least:
                continue
            # Without a forward pass of its own there is nothing to gather a module for.
            runs = type(child).forward is not nn.Module.forward
            # Of attention torch uses the layer inside without calling it.
            whole = isinstance(child, nn.MultiheadAttention) or not any(child.children())
            if runs and (size <= most or whole):
                chosen.append(child)
            else:
                visit(child)

    visit(module)
    return chosen


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def unshared(parts: list[nn.Module], module: nn.Module) -> list[nn.Module]:
    """Those of ``parts`` none of whose parameters is one of a module outside of it too.

    A parameter cannot be in two groups; one with a second name elsewhere is gathered with the
    whole, for both.
    """
    return [part for part in parts if not _shares(part, module)]


def _shares(part: nn.Module, module: nn.Module) -> bool:
    inside = set(part.modules())
    held = {id(parameter) for parameter in part.parameters()}
    return any(
        id(parameter) in held
        for each in module.modules()
        if each not in inside
        for parameter in each.parameters(recurse=False)
    )
