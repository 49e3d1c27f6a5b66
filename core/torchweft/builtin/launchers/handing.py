"""Handing a function and its arguments to fresh processes."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torchweft.errors import Misuse

__all__ = ["pack_call"]


def pack_call(
    function: Callable[..., Any], arguments: tuple[Any, ...], *, not_forked: str = ""
) -> bytes:
    """Pickle once for all ranks, plainly: torch's own pickling would share tensors' memory.

    ``not_forked``: why the launcher that pickles nothing was not taken. Raises ``Misuse``, which
    names what cannot be handed over.
    """
    way_out = "use launcher='fork', which pickles nothing"
    if not_forked:
        way_out = (
            f"call fabric.launch(function) before this: {not_forked}, so nothing can be forked"
        )
    buffer = io.BytesIO()
    packer = _Packer(buffer, protocol=pickle.HIGHEST_PROTOCOL)
    try:
        packer.dump((function, arguments))
    except Exception as error:
        raise Misuse(
            f"fresh processes cannot be given {_culprit(function, arguments)}, which cannot be "
            f"pickled: {error}; define it at the top level of a module, or {way_out}"
        ) from error
    if packer.of_main and not _main_can_be_imported():
        names = ", ".join(f"'{name}'" for name in dict.fromkeys(packer.of_main))
        raise Misuse(
            f"fresh processes cannot be given {names}, which was defined in a program that they "
            "cannot import (an interactive session, python -c, or standard input); define it in a "
            f"module, or {way_out}"
        )
    return buffer.getvalue()


class _Packer(pickle.Pickler):
    """Notes what can only be found again by importing the program itself."""

    def __init__(self, buffer: io.BytesIO, *, protocol: int) -> None:
        super().__init__(buffer, protocol=protocol)
        self.of_main: list[str] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type | FunctionType) and value.__module__ == "__main__":
            self.of_main.append(value.__qualname__)
        return NotImplemented


def _main_can_be_imported() -> bool:
    """Whether ``multiprocessing`` will find a module or a file to import in its children."""
    main = sys.modules["__main__"]
    named = getattr(main, "__spec__", None) is not None
    return named or getattr(main, "__file__", None) is not None


def _culprit(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    named: list[tuple[str, Any]] = [("the function", function)]
    for argument in arguments:
        named += _parts(argument)
    for name, value in named:
        try:
            pickle.dumps(value)
        except Exception:
            return name
    return "an argument"


def _parts(argument: Any) -> list[tuple[str, Any]]:
    describe = getattr(argument, "picklable_parts", None)
    if describe is not None:
        return list(describe())
    if isinstance(argument, FunctionType):
        return [(f"the function {argument.__qualname__}()", argument)]
    return [(f"the argument {argument!r:.60}", argument)]
