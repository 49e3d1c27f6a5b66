"""Whether a class's constructor is a schema of options: keywords, with types and words."""

from __future__ import annotations

import inspect
import pkgutil
import re
from typing import Any

__all__ = ["needed", "not_keywords", "undocumented", "untyped"]

_Parameter = inspect.Parameter

#: A class of another library whose keywords are meant, ``package.module.Class`` in a docstring.
_NAMED = re.compile(r"``([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(\))?``")


def not_keywords(cls: type) -> list[str]:
    """Parameters that no option can reach: ``x, /`` and ``*args``."""
    return [
        f"*{parameter.name}" if parameter.kind is _Parameter.VAR_POSITIONAL else parameter.name
        for parameter in _parameters(cls)
        if parameter.kind in (_Parameter.POSITIONAL_ONLY, _Parameter.VAR_POSITIONAL)
    ]


def untyped(cls: type) -> list[str]:
    """Options without an annotation."""
    return [
        parameter.name for parameter in _options(cls) if parameter.annotation is _Parameter.empty
    ]


def needed(cls: type) -> list[str]:
    """Options without a default."""
    return [parameter.name for parameter in _options(cls) if parameter.default is _Parameter.empty]


def undocumented(cls: type) -> list[str]:
    """Options that no docstring of the class, its constructor or its bases describes.

    A description is a line that begins with the option's name and has a colon behind it
    (``name: …``, ``name (int): …``, ``name : int``, ``:param int name: …``). Or the text names, by
    its whole path in double backquotes, a class or function that has a parameter of that name.
    """
    text = "\n".join(_docstrings(cls))
    elsewhere = {name for path in _NAMED.findall(text) for name in _parameters_of(path)}
    return [
        parameter.name
        for parameter in _options(cls)
        if parameter.name not in elsewhere and not _described(parameter.name, text)
    ]


def _parameters(cls: type) -> list[inspect.Parameter]:
    return list(inspect.signature(cls).parameters.values())


def _options(cls: type) -> list[inspect.Parameter]:
    kinds = (_Parameter.KEYWORD_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in _parameters(cls) if parameter.kind in kinds]


def _docstrings(cls: type) -> list[str]:
    classes = cls.__mro__[:-1]
    constructors = [vars(each)["__init__"] for each in classes if "__init__" in vars(each)]
    return [inspect.cleandoc(each.__doc__) for each in (*classes, *constructors) if each.__doc__]


def _described(name: str, text: str) -> bool:
    others = r"(?:[*`]*\w+[*`]*,\s*)*"
    google = rf"{others}[*`]*{name}[*`]*(?:,\s*[*`]*\w+[*`]*)*\s*(?:\([^)]*\))?\s*:"
    sphinx = rf":(?:param|keyword)\s+(?:[^:]*\s)?{name}\s*:"
    return re.search(rf"^\s*(?:[-*]\s+)?(?:{google}|{sphinx})", text, re.MULTILINE) is not None


def _parameters_of(path: str) -> list[str]:
    try:
        found: Any = pkgutil.resolve_name(path)
        return list(inspect.signature(found).parameters)
    # What is between backquotes may be anything: a file, a module, a flag.
    except Exception:
        return []
