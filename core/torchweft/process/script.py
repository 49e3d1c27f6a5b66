"""Running a script in a process that is already there, as ``python script.py`` would."""

from __future__ import annotations

import builtins
import os
import runpy
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from torchweft.process.end import exit_status, wind_down
from torchweft.process.failure import record_failure

__all__ = ["run_call", "run_module", "run_script"]

T = TypeVar("T")


def run_script(path: str, arguments: list[str]) -> int:
    """Run a script as ``python path arguments…`` would; returns the status it ends with.

    An exception is recorded for the supervisor. The script's namespace is kept.
    """
    whole = os.path.abspath(path)
    main = _main(__file__=whole, __cached__=None, __loader__=SourceFileLoader("__main__", whole))
    sys.argv = [path, *arguments]
    sys.orig_argv = [sys.executable, path, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # python -P
        sys.path[0] = str(Path(path).resolve().parent)

    def run() -> None:
        source = Path(path).read_bytes()
        exec(compile(source, whole, "exec", dont_inherit=True), main.__dict__)

    return _run(run)


def run_module(name: str, arguments: list[str]) -> int:
    """Run a module as ``python -m name arguments…`` would; otherwise as ``run_script``."""
    sys.argv = ["-m", *arguments]
    sys.orig_argv = [sys.executable, "-m", name, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd()

    def run() -> None:
        # What python -m itself calls; like it, the packages around the module are imported first.
        _, spec, code = runpy._get_module_details(name)  # type: ignore[attr-defined]
        main = _main(
            __file__=spec.origin,
            __cached__=spec.cached,
            __loader__=spec.loader,
            __package__=spec.parent,
            __spec__=spec,
        )
        sys.argv[0] = spec.origin
        exec(code, main.__dict__)

    return _run(run)


def run_call(call: Callable[[], T], hand_over: Callable[[T], None]) -> int:
    """Call, in a rank, and hand over what comes back; otherwise as ``run_script``."""
    return _run(lambda: hand_over(call()))


def _main(**attributes: object) -> ModuleType:
    """A fresh ``__main__``, which this interpreter has from here on."""
    main = ModuleType("__main__")
    main.__dict__.update(attributes, __builtins__=builtins)
    if sys.version_info < (3, 14):  # from there on it is made when it is asked for
        main.__annotations__ = {}
    sys.modules["__main__"] = main
    # The name under which multiprocessing's children, and what they send, know it.
    sys.modules["__mp_main__"] = main
    return main


def _run(run: Callable[[], None]) -> int:
    status = 0
    try:
        run()
    except BaseException as error:
        status = exit_status(error)
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            record_failure(error)
        elif status != 0:
            sys.last_value = error  # the group is left without waiting for the others
    wind_down(status)
    return status
