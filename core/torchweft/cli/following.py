"""Shows on the terminal what ranks write into their files, each line behind its rank.

Not torch's ``TailLog``: it does not flush, and puts its prefix into the middle of a line that a
rank writes in two parts.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from torchweft.process import FAILURE, HEADING, outputs

__all__ = ["Follower"]

#: Seconds between two looks at the files.
_TICK = 0.05
_AT_ONCE = 1 << 20


@dataclass(slots=True)
class _File:
    descriptor: int
    rest: bytes = b""
    failed: bool = False


class Follower:
    """Follows the ranks of one node from its making until ``stop``.

    Args:
        folder: of the run, where ranks say which file is theirs.
        ranks: those that are shown; None: all.
        target: a file descriptor that lines are written to.
    """

    def __init__(self, folder: Path, ranks: tuple[int, ...] | None, target: int = 1) -> None:
        self._folder = folder
        self._ranks = ranks
        self._target = target
        self._files: dict[int, _File] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Show the rest; the ranks are gone."""
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._stopped.wait(_TICK)
            self._look()
        for rank, file in self._files.items():
            if file.rest:
                self._show(rank, [file.rest])
            os.close(file.descriptor)

    def _look(self) -> None:
        for output in outputs(self._folder):
            if output.rank in self._files or (
                self._ranks is not None and output.rank not in self._ranks
            ):
                continue
            descriptor = os.open(output.path, os.O_RDONLY)
            os.lseek(descriptor, output.start, os.SEEK_SET)
            self._files[output.rank] = _File(descriptor)
        for rank, file in self._files.items():
            while content := os.read(file.descriptor, _AT_ONCE):
                *lines, file.rest = (file.rest + content).split(b"\n")
                self._show(rank, lines)

    def _told_elsewhere(self, rank: int, line: bytes) -> bool:
        """Whether it is a heading, or of the error that ended an attempt: the report tells it."""
        file = self._files[rank]
        heading = line.startswith(HEADING.encode())
        if heading:
            file.failed = line.endswith(FAILURE.encode())
        return heading or file.failed

    def _show(self, rank: int, lines: list[bytes]) -> None:
        lines = [line for line in lines if not self._told_elsewhere(rank, line)]
        # Of a line that was written over again and again, as a progress bar is, the last state.
        shown = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]
        prefix = f"[rank {rank}] ".encode()
        text = b"".join(prefix + line + b"\n" for line in shown)
        try:
            while text:
                text = text[os.write(self._target, text) :]
        except OSError:  # nobody reads it any more; the files are written all the same
            self._target = os.open(os.devnull, os.O_WRONLY)
