"""Running a few lines in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

__all__ = ["python"]


def python(
    code: str,
    *arguments: str | Path,
    environ: Mapping[str, str | None] | None = None,
    timeout: float = 60,
    **options: object,
) -> subprocess.CompletedProcess[str]:
    """What became of ``python -c code arguments…``; a variable that is None is unset."""
    variables = {**os.environ, **(environ or {})}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **{"stdin": subprocess.DEVNULL, **options},  # type: ignore[call-overload]
    )
