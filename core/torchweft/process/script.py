"""Running a script in a process that is already there, as ``python script.py`` would."""

from __future__ import annotations

import builtins
import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from torchweft.process.end import exit_status, wind_down
from torchweft.process.failure import record_failure

__all__ = ["run_script"]


def run_script(path: str, arguments: list[str]) -> int:
    """Run a script as ``python path arguments…`` would; returns the status it ends with.

    An exception is recorded for the supervisor. The script's namespace is kept.
    """
    main = ModuleType("__main__")
    whole = os.path.abspath(path)
    main.__dict__.update(
        __file__=whole,
        __cached__=None,
        __loader__=SourceFileLoader("__main__", whole),
        __builtins__=builtins,
    )
    if sys.version_info < (3, 14):  # from there on it is made when it is asked for
        main.__annotations__ = {}
    sys.modules["__main__"] = main
    # The name under which multiprocessing's children, and what they send, know it.
    sys.modules["__mp_main__"] = main
    sys.argv = [path, *arguments]
    sys.orig_argv = [sys.executable, path, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # python -P
        sys.path[0] = str(Path(path).resolve().parent)
    status = 0
    try:
        source = Path(path).read_bytes()
        exec(compile(source, whole, "exec", dont_inherit=True), main.__dict__)
    except BaseException as error:
        status = exit_status(error)
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            record_failure(error)
        elif status != 0:
            sys.last_value = error  # the group is left without waiting for the others
    wind_down(status)
    return status
