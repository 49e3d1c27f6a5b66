"""The ways to start a script that tests compare, and what a command under test started."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from torchweft.testing import commands
from torchweft.testing.commands import Result, clean_environment, marked

__all__ = ["SCRIPTS", "Command", "Result", "clean_environment", "ways"]

SCRIPTS = Path(__file__).parent / "scripts"


class Command(commands.Command):
    """A command in a session of its own."""

    def processes(self) -> list[psutil.Process]:
        """What it started and is still there."""
        return [psutil.Process(pid) for pid in marked(self.mark)]


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
