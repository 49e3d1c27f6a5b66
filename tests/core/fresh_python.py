"""Running a few lines in a fresh interpreter that is left as Python makes it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from torchweft.testing.interpreter import fresh_interpreter

__all__ = ["python"]


def python(
    code: str,
    *arguments: str | Path,
    environ: Mapping[str, str | None] | None = None,
    timeout: float = 60,
    cwd: str | Path | None = None,
    input: str = "",
    stdin: None = None,
) -> subprocess.CompletedProcess[str]:
    """What became of ``python -c code arguments…``; a variable that is None is unset.

    ``input`` is read from its standard input, which is a pipe, as ``stdin=None`` says.
    """
    done = fresh_interpreter(
        code,
        *arguments,
        environ={"PYTHONWARNINGS": None, "PYTHONUNBUFFERED": None, **(environ or {})},
        timeout=timeout,
        cwd=cwd,
        typed=input,
        session=False,
    )
    return subprocess.CompletedProcess((), done.status, done.out, done.err)
