"""A rank's output in a file of its own, and what tells the command where that is."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from torchweft.process.files import flush_streams

__all__ = ["FAILURE", "HEADING", "Output", "add_failure", "outputs", "redirect_output"]

#: How the line begins that separates the attempts of a run, and the runs, in a file.
HEADING = "--- torchweft: "
#: How the line ends behind which the error follows that ended a rank.
FAILURE = " failed ---"

_PREFIX = "output-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where a rank's output goes.

    Attributes:
        rank: global rank.
        path: of the file.
        start: bytes that stood there before this run.
    """

    rank: int
    path: str
    start: int


def redirect_output(log_dir: str, folder: str) -> None:
    """From here on, append what this rank prints to ``log_dir/rank-N.log``.

    ``folder`` is the run's own, on this node, where the command looks for what it follows.
    """
    rank = int(os.environ["RANK"])
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    os.makedirs(log_dir, exist_ok=True)
    path = _file(log_dir, rank)
    flush_streams()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    start = os.fstat(file).st_size
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(file, f"{HEADING}rank {rank}, attempt {int(restart) + 1}, {when} ---\n".encode())
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    for stream in (sys.stdout, sys.stderr):
        # Whoever follows the file sees a line when it is whole.
        getattr(stream, "reconfigure", lambda **_: None)(line_buffering=True)
    part = Path(folder) / f"part-output-{rank}"
    part.write_text(json.dumps({"rank": rank, "path": path, "start": start}))
    part.replace(Path(folder) / f"{_PREFIX}{rank}")


def add_failure(log_dir: str, text: str) -> None:
    """Write the error that ends this rank into its file; the report tells it on the terminal."""
    rank = os.environ.get("RANK", "0")
    flush_streams()
    with contextlib.suppress(OSError):  # it only repeats
        path = _file(log_dir, rank)
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            begun = file.read() != b"\n"
        with open(path, "ab") as file:
            heading = f"{HEADING}rank {rank}{FAILURE}"
            file.write(f"{chr(10) if begun else ''}{heading}\n{text}".encode(errors="replace"))


def _file(log_dir: str, rank: int | str) -> str:
    return os.path.join(os.path.abspath(log_dir), f"rank-{rank}.log")


def outputs(folder: str | Path) -> list[Output]:
    """Those of the ranks of this node, by rank."""
    found = [json.loads(file.read_text()) for file in Path(folder).glob(f"{_PREFIX}*")]
    return sorted((Output(**fields) for fields in found), key=lambda output: output.rank)
