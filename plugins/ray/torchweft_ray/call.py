"""A function and its arguments, on their way to ranks: pickled by value where that is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torchweft.errors import Misuse

__all__ = ["packed"]


def packed(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    """Pickle them once for all ranks.

    What a script or a notebook defines is taken along, closures too; what is in a module is
    imported there. Raises ``Misuse``, which names what cannot be handed over.
    """
    # Ray's: it keeps the names of files, which tracebacks show.
    from ray import cloudpickle

    try:
        data: bytes = cloudpickle.dumps((function, arguments))
    except Exception as error:
        culprit = _culprit(cloudpickle.dumps, arguments)
        raise Misuse(
            f"the ranks on a Ray cluster cannot be given {culprit}, which cannot be pickled: "
            f"{error}; make it in the function, in each rank"
        ) from error
    return data


def _culprit(dumps: Callable[[Any], bytes], arguments: tuple[Any, ...]) -> str:
    for name, value in _parts(arguments):
        try:
            dumps(value)
        except Exception:
            return name
    return "an argument"


def _parts(arguments: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """What there is, by the words of an error message."""
    fabric, function, positional, named = arguments
    yield from fabric.picklable_parts()
    yield f"the function {getattr(function, '__qualname__', function)}()", function
    for value in (*positional, *named.values()):
        yield f"the argument {value!r:.60}", value
