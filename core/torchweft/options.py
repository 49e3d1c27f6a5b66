"""A class's constructor signature is the schema of its options."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from torchweft.errors import InvalidRequest, UnknownOption, did_you_mean

__all__ = ["check_options", "fits", "spell_type"]

_PLAIN = (bool, int, float, str, type(None))


def check_options(kind: str, name: str, cls: Any, options: Mapping[str, Any]) -> None:
    """Check options against the constructor of ``cls``: known names, and simple types.

    Raises ``UnknownOption`` with the nearest known option, or ``InvalidRequest`` for a value of
    another type than a plainly annotated parameter takes, and for a required option left out.
    """
    signature = _signature(cls)
    parameters = {
        parameter.name: parameter
        for parameter in signature
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature)
    for key, value in options.items():
        if key not in parameters and not takes_any:
            known = ", ".join(sorted(parameters)) or "none"
            near = did_you_mean(key, parameters) or ";"
            raise UnknownOption(
                f"{kind} '{name}' has no option '{key}'{near} options of {cls.__name__}: {known}"
            )
        if key in parameters and not fits(value, parameters[key].annotation):
            hint = spell_type(parameters[key].annotation)
            raise InvalidRequest(f"{kind} '{name}' takes {key} as {hint}, not {value!r}")
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in options:
            raise InvalidRequest(
                f"{kind} '{name}' needs the option '{parameter.name}'; "
                f"write {kind}='{name}:{parameter.name}=…'"
            )


def _signature(cls: Any) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(cls, eval_str=True)
    except NameError:
        # An annotation that only a type checker can resolve decides nothing here.
        signature = inspect.signature(cls)
    return list(signature.parameters.values())


def fits(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation; annotations that are not plain fit everything.

    Plain are ``bool``, ``int``, ``float`` (which takes an ``int``), ``str``, ``None``, literals,
    ``tuple[X, ...]``, and unions of these. A ``bool`` is no ``int`` here: nobody means
    ``bucket=true`` as 1.
    """
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(hint))
    if origin is tuple and typing.get_args(hint)[1:] == (...,):
        element = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(fits(each, element) for each in value)
    if hint not in _PLAIN:
        return True
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


def spell_type(hint: Any) -> str:
    """An annotation as an error message spells it: ``"int | None"``, ``"'sum' | 'mean'"``."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " | ".join(repr(word) for word in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(spell_type(part) for part in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
