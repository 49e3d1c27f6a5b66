"""The program that a command is to run: found, and Python, before any process is made for it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import click

from torchweft.errors import InvalidRequest, did_you_mean

__all__ = ["check_program", "module_option"]

#: The flag of a command that runs a module as well as a script.
module_option = click.option(
    "-m", "--module", is_flag=True, help="SCRIPT is a module's name, as for python -m."
)


def check_program(script: str, module: bool, command: click.Command) -> list[str]:
    """What python is to be given for it; ``InvalidRequest`` unless there is such a program."""
    if module:
        _check_module(script)
        return ["-m", script]
    _check_script(script, command)
    return [script]


def _check_module(name: str) -> None:
    """Raise ``InvalidRequest`` unless ``python -m`` would find that module in the current folder.

    Nothing is imported for it. Of a package that makes its own ``__path__`` Python has the word.
    """
    if "/" in name or not all(name.split(".")):
        raise InvalidRequest(
            f"-m takes a module's name, such as package.train; '{name}' is none. For a file leave "
            "-m out"
        )
    here = os.getcwd()
    first, *rest = name.split(".")
    added = [path for path in [here] if path not in sys.path]
    sys.path[:0] = added
    try:
        spec = importlib.util.find_spec(first)
        known = first
        while spec is not None and rest and spec.submodule_search_locations is not None:
            if _extends_itself(spec):
                return
            known = f"{known}.{rest.pop(0)}"
            spec = _find(known, list(spec.submodule_search_locations))
        if spec is not None and spec.submodule_search_locations is not None and not rest:
            known = f"{name}.__main__"
            if not _extends_itself(spec):
                spec = _find(known, list(spec.submodule_search_locations))
    except (ImportError, ValueError):  # of a finder that is not Python's, which has the last word
        return
    finally:
        del sys.path[: len(added)]
    if spec is not None and not rest:
        return
    if known == f"{name}.__main__":
        raise InvalidRequest(
            f"-m {name} is a package without a module __main__, which is what Python runs of a "
            "package; name a module in it"
        )
    why = f"there is no {known}" if spec is None else f"{known} is no package"
    raise InvalidRequest(
        f"no module is called '{name}' (-m): {why} in {here} or where Python looks; a script is "
        "run by its path, without -m"
    )


def _find(name: str, places: Sequence[str]) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find(name, places) if find is not None else None
        if spec is not None:
            return spec
    return None


def _extends_itself(spec: ModuleSpec) -> bool:
    """Whether the package's own code may say where its modules are."""
    if not spec.origin or not os.path.isfile(spec.origin):
        return False
    return b"__path__" in Path(spec.origin).read_bytes()


def _check_python(path: Path) -> None:
    """Raise ``InvalidRequest`` for a file that python would only stumble over."""
    with path.open("rb") as file:
        head = file.read(4096)
    first = head.split(b"\n", 1)[0]
    if path.suffix == ".ipynb":
        what = "a notebook; save it as a script (jupyter nbconvert --to script), or launch in it"
    elif path.suffix != ".py" and first.startswith(b"#!") and b"python" not in first:
        what = f"a program for {first[2:].decode(errors='replace').strip()}; let it call this"
        what += " command with the Python file in it"
    elif b"\0" in head:
        what = "no text; name the Python source"
    else:
        return
    raise InvalidRequest(
        f"script '{path}' is not Python: it is {what}. A module is run with -m package.module"
    )


def _check_script(script: str, command: click.Command) -> None:
    """Raise ``InvalidRequest`` unless there is a script, for a command that takes one."""
    path = Path(script)
    if path.is_file():
        _check_python(path)
        return
    if script.startswith("-"):
        flags = [flag for parameter in command.params for flag in parameter.opts]
        name = script.partition("=")[0]
        raise InvalidRequest(
            f"'torchweft {command.name}' has no option {name}{did_you_mean(name, flags)}; what is "
            "meant for the script stands behind its path"
        )
    if path.is_dir():
        raise InvalidRequest(f"script '{script}' is a folder; name the Python file in it")
    near = ""
    if path.parent.is_dir():
        names = sorted(other.name for other in path.parent.glob("*.py"))[:5]
        near = f"; Python files there: {', '.join(names)}" if names else ""
    module = script.removesuffix(".py")
    named = "." in module and all(part.isidentifier() for part in module.split("."))
    if not near and named:
        near = f"; a module is run with -m {module}"
    raise InvalidRequest(
        f"script '{script}' does not exist (looked in {path.absolute().parent}){near}"
    )
