"""What every rank runs: the script or module that this process was started with, or a function."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

from torchweft.errors import Misuse
from torchweft.launching import interpreter_flags

__all__ = ["Program", "of_function", "of_this_process"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a rank runs, in a fresh interpreter.

    Attributes:
        kind: how.
        name: path of the script, or name of the module; for a function, the file of the program
            that launches, if it has one.
        arguments: what stood behind it; for a function, all of ``sys.argv``.
        flags: of the interpreter.
        path: ``sys.path``, for what a function imports.
    """

    kind: Literal["script", "module", "function"]
    name: str = ""
    arguments: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    path: tuple[str, ...] = ()


def of_function() -> Program:
    """Call a function, which can import what can be imported here."""
    return Program(
        kind="function",
        name=getattr(sys.modules["__main__"], "__file__", None) or "",
        arguments=tuple(sys.argv),
        flags=tuple(interpreter_flags()),
        path=tuple(os.path.abspath(entry) for entry in sys.path),
    )


def of_this_process() -> Program:
    """Run again, from its beginning, what this process runs.

    Raises ``Misuse`` where that cannot be run again.
    """
    main: Any = sys.modules["__main__"]
    reason = _not_again(main)
    if reason:
        raise Misuse(
            f"launcher 'ray' runs the script in every rank from its beginning, and here {reason}; "
            "pass the training function to fabric.launch(function), or put the script into a file "
            "and start it with 'python train.py'"
        )
    flags = tuple(interpreter_flags())
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        name = spec.name.removesuffix(".__main__")
        return Program(kind="module", name=name, arguments=_behind_module(name), flags=flags)
    name, arguments = _script(main.__file__)
    return Program(kind="script", name=name, arguments=arguments, flags=flags)


def _not_again(main: Any) -> str | None:
    if "_pytest.runner" in sys.modules and "PYTEST_CURRENT_TEST" in os.environ:
        return "pytest runs"
    if hasattr(sys, "ps1") or sys.flags.interactive or "ipykernel" in sys.modules:
        return "is an interactive session"
    if getattr(main, "__file__", None) is None:
        return "is no script in a file (python -c, or standard input)"
    return None


def _script(file: str) -> tuple[str, tuple[str, ...]]:
    """The script as it was written, and its arguments as they were before anybody took some."""
    words = sys.orig_argv
    for place, word in enumerate(words[1:], 1):
        if os.path.abspath(word) == os.path.abspath(file):
            return word, tuple(words[place + 1 :])
    return os.path.abspath(file), tuple(sys.argv[1:])  # the folder was changed meanwhile


def _behind_module(name: str) -> tuple[str, ...]:
    words = sys.orig_argv
    for place, word in enumerate(words[1:], 1):
        if word == name or (word.startswith("-") and word.endswith(f"m{name}")):
            return tuple(words[place + 1 :])
    return tuple(sys.argv[1:])
