"""A class's constructor signature is the schema of its options."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from torchweft.errors import InvalidRequest, UnknownOption, did_you_mean

__all__ = ["check_options"]

_PLAIN = (bool, int, float, str, type(None))


def check_options(kind: str, name: str, cls: Any, options: Mapping[str, Any]) -> None:
    """Check options against the constructor of ``cls``: known names, and simple types.

    Raises ``UnknownOption`` with the nearest known option, or ``InvalidRequest`` for a value of
    another type than a plainly annotated parameter takes.
    """
    parameters = {
        parameter.name: parameter
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    takes_any = any(
        parameter.kind is parameter.VAR_KEYWORD
        for parameter in inspect.signature(cls).parameters.values()
    )
    try:
        hints = typing.get_type_hints(cls.__init__)
    except Exception:  # an annotation that only a type checker can resolve decides nothing here
        hints = {}
    for key, value in options.items():
        if key not in parameters and not takes_any:
            known = ", ".join(sorted(parameters)) or "none"
            near = did_you_mean(key, parameters) or ";"
            raise UnknownOption(
                f"{kind} '{name}' has no option '{key}'{near} options of {cls.__name__}: {known}"
            )
        if key in hints and not _fits(value, hints[key]):
            raise InvalidRequest(
                f"{kind} '{name}' takes {key} as {_spell(hints[key])}, not {value!r}"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation; annotations that are not plain fit everything."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint not in _PLAIN:
        return True
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
