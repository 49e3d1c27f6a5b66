"""Code in a new interpreter: what it prints, how it ends, and what is imported by then."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Interpreted", "fresh_interpreter"]

#: Seconds in which an interpreter whose time is up may write where it stands.
_PATIENCE = 3.0

#: What is run first: it leaves no name behind, so that the code finds an empty module.
_RUN = (
    "exec(__import__('sys').argv.pop(1), {})\n"
    "exec(compile(__import__('sys').argv.pop(1), '<fresh>', 'exec'))\n"
)

_BEGIN = """
import atexit, os, sys
if {path!r}:
    sys.path[:] = {path!r}
def report(mine=os.getpid()):
    if os.getpid() == mine:
        with open({report!r}, "w", encoding="utf-8") as file:
            file.write("\\n".join(map(str, sys.modules)))
atexit.register(report)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreted:
    """How an interpreter ended.

    Attributes:
        status: its exit status; negative is the number of the signal that ended it.
        out: what it printed.
        err: what it wrote to standard error, tracebacks included.
        loaded: names of the modules that were imported when it ended; empty when it did not end
            by itself (``os._exit``, a signal).
    """

    status: int
    out: str
    err: str
    loaded: frozenset[str]


def fresh_interpreter(
    code: str,
    *arguments: str | Path,
    environ: Mapping[str, str | None] | None = None,
    timeout: float = 60,
    python: str = sys.executable,
    cwd: str | Path | None = None,
    typed: str = "",
    session: bool = True,
) -> Interpreted:
    """Run ``code`` in a new Python interpreter, and wait for it and for what holds its output.

    It finds the modules that this process finds (another ``python`` has its own), and it is the
    same place otherwise: the environment, the working directory. Warnings are errors there, and
    nothing is buffered; ``environ={"PYTHONWARNINGS": None, "PYTHONUNBUFFERED": None}`` lets go of
    that.

    Args:
        code: source; what all lines are indented by is taken away.
        arguments: ``sys.argv[1:]``.
        environ: variables to set; one that is None is unset.
        timeout: seconds after which it is ended.
        python: the interpreter.
        cwd: its working directory; None: this process's.
        typed: what it reads from standard input.
        session: whether it leads a session of its own, as a service does, so that all of it can
            be ended; otherwise it belongs to this process's, and only itself is ended.

    Raises:
        TimeoutError: with what was printed until then, and where the interpreter stood.
    """
    # A path that the caller names goes before that of this process, as PYTHONPATH does.
    first = ((environ or {}).get("PYTHONPATH") or "").split(os.pathsep)
    path = [*filter(None, first), *sys.path] if python == sys.executable else []
    with tempfile.TemporaryDirectory(prefix="torchweft-fresh-") as folder:
        report = Path(folder) / "loaded"
        begin = _BEGIN.format(path=path, report=str(report))
        command = [python, "-X", "faulthandler", "-c", _RUN, begin, textwrap.dedent(code)]
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            env=_variables(environ or {}),
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=session,
        )
        with process:
            out, err = _wait(process, typed, timeout, session)
        try:
            loaded = frozenset(report.read_text(encoding="utf-8").splitlines())
        except FileNotFoundError:
            loaded = frozenset()
    return Interpreted(status=process.returncode, out=out, err=err, loaded=loaded)


def _variables(given: Mapping[str, str | None]) -> dict[str, str]:
    # An interpreter that keeps no bytecode compiles everything again, torch takes seconds.
    own = {"PYTHONDONTWRITEBYTECODE": None, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
    variables = {**os.environ, **own, **given}
    return {name: value for name, value in variables.items() if value is not None}


def _wait(
    process: subprocess.Popen[bytes], typed: str, timeout: float, session: bool
) -> tuple[str, str]:
    try:
        out, err = process.communicate(typed.encode(), timeout)
    except subprocess.TimeoutExpired:
        out, err = _end(process, session)
        raise TimeoutError(
            f"a fresh interpreter was not done after {timeout:g} s; until then it printed\n"
            f"{_text(out) or '(nothing)'}\nand on standard error\n{_text(err) or '(nothing)'}"
        ) from None
    except BaseException:
        _kill(process, session)
        raise
    return _text(out), _text(err)


def _end(process: subprocess.Popen[bytes], session: bool) -> tuple[bytes, bytes]:
    """End it, and its session where it has one; what it wrote, the stacks of its threads last."""
    _leave_no_core(process.pid)
    # faulthandler answers this signal with the stacks.
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE)
    _kill(process, session)
    try:
        return process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired as stuck:
        # A process that is out of reach holds the pipes.
        return stuck.stdout or b"", stuck.stderr or b""


def _kill(process: subprocess.Popen[bytes], session: bool) -> None:
    # Of a group that has ended macOS says that it may not be signalled.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if session:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _leave_no_core(pid: int) -> None:
    if sys.platform == "linux":
        import resource

        with contextlib.suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
