"""Choosing modules of a model by an option: by names of classes, by classes, or by a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from torchweft.errors import InvalidRequest, did_you_mean

__all__ = ["Choice", "check_choice", "chosen_by"]

#: What an option that chooses modules takes.
Choice = str | Callable[[nn.Module], bool] | type[nn.Module] | Iterable[type[nn.Module]] | None


def check_choice(strategy: str, option: str, value: Any) -> Any:
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
        f"strategy '{strategy}' was given {option}={value!r}; it takes names of classes joined by "
        f"'+', such as {option}=Block+Embedding, classes of modules, or a function of a module"
    )


def chosen_by(module: nn.Module, strategy: str, option: str, value: Any) -> list[nn.Module]:
    """The modules inside of ``module`` that a checked value chooses, inner ones first.

    Raises ``InvalidRequest`` where it chooses none.
    """
    if value is None:
        return []
    inner = [each for each in module.modules() if each is not module]
    chooses = _chooser(value)
    chosen = [each for each in reversed(inner) if chooses(each)]
    if not chosen:
        classes = sorted({type(each).__name__ for each in inner})
        near = did_you_mean(value, classes) if isinstance(value, str) else ""
        there = (
            f"its modules are of the classes {', '.join(classes)}" if inner else "it has no modules"
        )
        raise InvalidRequest(
            f"strategy '{strategy}' was given {option}={_spelt(value)}, which chooses no part of "
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
