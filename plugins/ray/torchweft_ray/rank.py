"""The program of a rank, in a folder of its own: what its actor starts.

Imports no torch, so that a script may set variables which torch reads when it is imported, and no
Ray, which a script does not need.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torchweft.launching import (
    Handoff,
    claim,
    collector_off,
    die_with_parent,
    record_failure,
    run_call,
    run_module,
    run_script,
)
from torchweft_ray.program import Program

__all__ = ["CALL", "PROGRAM", "RESULT", "SOCKET", "main"]

#: Files in a rank's folder.
PROGRAM, CALL, RESULT = "program", "call", "result"
#: The variable that tells rank 0 which descriptor already listens on the port where all meet.
SOCKET = "TORCHWEFT_RAY_SOCKET"


def main(folder: str) -> None:
    """Be the rank that the environment says, and run what lies in ``folder``."""
    handoff = Handoff.read(os.environ)
    if handoff is None or handoff.parent is None:  # the actor has died meanwhile
        os._exit(1)
    die_with_parent(handoff.parent)
    status = 1
    try:
        claim(os.environ)
        _begin()
        program: Program = pickle.loads((Path(folder) / PROGRAM).read_bytes())
        status = _run(program, Path(folder))
    except BaseException as error:
        record_failure(error)
    finally:
        os._exit(status)


def _begin() -> None:
    if SOCKET in os.environ:
        os.set_inheritable(int(os.environ[SOCKET]), False)
    # A pipe: what is printed would wait for much more to be printed.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _run(program: Program, folder: Path) -> int:
    if program.kind == "script":
        sys.path.insert(0, "")  # the script's folder takes the place
        return run_script(program.name, list(program.arguments))
    if program.kind == "module":
        sys.path.insert(0, "")
        return run_module(program.name, list(program.arguments))
    sys.path[:0] = [entry for entry in program.path if entry not in sys.path]
    sys.argv = list(program.arguments)
    if program.name:
        sys.modules["__main__"].__file__ = program.name
    with collector_off():  # it imports torch, and whatever else the function needs
        function, arguments = pickle.loads((folder / CALL).read_bytes())
    return run_call(partial(function, *arguments), _hand_over(folder))


def _hand_over(folder: Path) -> Callable[[Any], None]:
    def hand_over(result: Any) -> None:
        if os.environ["RANK"] != "0":
            return
        from torchweft.api import pack_result

        (folder / RESULT).write_bytes(pack_result(result))

    return hand_over
