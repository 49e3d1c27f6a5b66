"""Running real commands: with a hard limit, every rank's stacks on a hang, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

SCRIPTS = Path(__file__).parent / "scripts"

#: Inherited by everything that a command under test starts.
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
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    environ = {
        key: value
        for key, value in os.environ.items()
        if key not in _NOT_INHERITED and not key.startswith(("TORCHWEFT_", "TORCHELASTIC_"))
    }
    # A rank that hangs prints where, when it is sent SIGABRT.
    environ["PYTHONFAULTHANDLER"] = "1"
    environ.update(extra or {})
    return environ


def members(mark: str) -> list[psutil.Process]:
    """Every process that carries a mark in its environment, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


class Command:
    """A command in a session of its own."""

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        stdin: int,
        cwd: Path | None,
    ) -> None:
        self.started = time.monotonic()
        self._mark = uuid.uuid4().hex
        self.popen = subprocess.Popen(
            list(command),
            env={**environ, MARK: self._mark},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        return members(self._mark)

    def finish(self, timeout: float = 90, text: str | None = None) -> Result:
        """Wait for the end; a hang prints every rank's stacks and fails the test."""
        try:
            out, err = self.popen.communicate(text, timeout=timeout)
        except subprocess.TimeoutExpired:
            for process in self.processes():
                os.kill(process.pid, signal.SIGABRT)
            time.sleep(1)
            self.kill()
            out, err = self.popen.communicate()
            pytest.fail(f"no end within {timeout} s\n--- out\n{out}\n--- err\n{err}")
        return Result(
            status=self.popen.returncode,
            out=out,
            err=err,
            seconds=time.monotonic() - self.started,
        )

    def kill(self) -> None:
        for process in self.processes():
            os.kill(process.pid, signal.SIGKILL)

    def left(self) -> list[str]:
        """What still runs shortly after the end (a fork server needs a moment to notice)."""
        deadline = time.monotonic() + 5
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return [f"{p.pid} {' '.join(p.cmdline())}" for p in self.processes()]


def ways(script: Path, ranks: int = 2) -> dict[str, list[str]]:
    """The commands that start the same script on the same number of processes.

    The script reads ``DEVICES`` where nothing outside makes the processes.
    """
    python = sys.executable
    torchweft = [python, "-m", "torchweft", "run"]
    return {
        "python": [python, str(script)],
        "torchweft run": [*torchweft, "--devices", str(ranks), str(script)],
        "no preload": [*torchweft, "--no-preload", "--devices", str(ranks), str(script)],
        "torchrun": [
            python,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            str(script),
        ],
    }
