"""Running real commands: with a hard limit, every process's stacks on a hang, and what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MARK", "Command", "Result", "clean_environment", "listens", "marked"]

#: Inherited by everything that a command starts.
MARK = "MARK_OF_THE_TEST"

#: Left by whoever runs the tests; none of it is meant for the commands under test.
_NOT_INHERITED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "PYTHONDONTWRITEBYTECODE",
    "PYTEST_CURRENT_TEST",
    "SLURM_STEP_ID",
)

_PROC = Path("/proc")
#: Seconds in which what a command started may notice that it has ended.
_PATIENCE = 5.0
#: Seconds between two looks at a command.
_TICK = 0.5
#: What ``/proc/net/tcp`` calls a socket that listens.
_LISTEN = "0A"


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a command ended.

    Attributes:
        status: its exit status; negative is the number of the signal that ended it.
        out: what it printed.
        err: what it wrote to standard error.
        seconds: from its start to its end.
    """

    status: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """The lines that it printed."""
        return self.out.splitlines()


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what makes of a command a rank, and with ``extra``."""
    environ = {
        key: value
        for key, value in os.environ.items()
        if key not in _NOT_INHERITED and not key.startswith(("TORCHWEFT_", "TORCHELASTIC_"))
    }
    # A rank that hangs prints where, when it is sent SIGABRT.
    environ["PYTHONFAULTHANDLER"] = "1"
    environ.update(extra or {})
    return environ


def marked(mark: str) -> list[int]:
    """Ids of the processes that carry a mark in their environment, whoever their parent is by now.

    None where the system has no ``/proc``.
    """
    found = []
    wanted = f"{MARK}={mark}".encode()
    for folder in _PROC.glob("[0-9]*"):
        # It may end while we look, or be somebody else's.
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            if wanted in variables and not _is_zombie(folder):
                found.append(int(folder.name))
    return found


def _is_zombie(folder: Path) -> bool:
    """The state follows the name, which may hold anything."""
    return (folder / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"


def listens(port: int) -> bool:
    """Whether any process of this computer listens on a TCP port, on whatever address."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    return True
    return False


class Command:
    """A command in a session of its own, so that nothing but it gets its signals."""

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        stdin: int,
        cwd: Path | None,
    ) -> None:
        self.started = time.monotonic()
        self.mark = uuid.uuid4().hex
        self._held: list[str] = []
        self.popen = subprocess.Popen(
            list(command),
            env={**environ, MARK: self.mark},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            start_new_session=True,
        )

    def finish(self, timeout: float = 90, text: str | None = None) -> Result:
        """Wait for the end; ``text`` is typed.

        What the command left behind may hold its output open; it is ended then, after it was
        noted for ``left``. Raises ``TimeoutError`` after ``timeout`` seconds, with everything that
        was printed and every process's stacks; nothing of the command is left then.
        """
        deadline, ended = time.monotonic() + timeout, float("inf")
        while True:
            try:
                out, err = self.popen.communicate(text, timeout=_TICK)
                break
            except subprocess.TimeoutExpired:
                now, text = time.monotonic(), None  # it remembers what is left to type
            if self.popen.poll() is not None:
                ended = min(ended, now)
            if now > deadline:
                out, err = self._give_up()
                raise TimeoutError(f"no end within {timeout:g} s\n--- out\n{out}\n--- err\n{err}")
            if now - ended > _PATIENCE:
                self._held += self._running()
                self.kill()
        return Result(
            status=self.popen.returncode,
            out=out,
            err=err,
            seconds=time.monotonic() - self.started,
        )

    def _give_up(self) -> tuple[str, str]:
        pids = marked(self.mark)
        _leave_no_core(pids)
        _send(pids, signal.SIGABRT)
        for seconds in (1, _PATIENCE):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.popen.communicate(timeout=seconds)
            self.kill()
        return "(held open by a process that is not known)", ""

    def interrupt(self) -> None:
        """Ctrl-C: a terminal sends it to every process of the group."""
        os.killpg(self.popen.pid, signal.SIGINT)

    def kill(self) -> None:
        """End it and everything that it started."""
        _send(marked(self.mark), signal.SIGKILL)
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)

    def left(self) -> list[str]:
        """What still runs shortly after the end (a fork server needs a moment to notice)."""
        deadline = time.monotonic() + _PATIENCE
        while marked(self.mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [*self._held, *self._running()]

    def _running(self) -> list[str]:
        return [f"{pid} {_command_line(pid)}" for pid in marked(self.mark)]


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _leave_no_core(pids: Sequence[int]) -> None:
    """The memory of processes that hold torch takes long to write, and helps nobody."""
    if sys.platform == "linux":
        import resource

        for pid in pids:
            with contextlib.suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def _command_line(pid: int) -> str:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return "(ended)"
    return b" ".join(words).decode(errors="replace").strip()
