"""How the guards of one node tell each other, and the command, how their ranks ended."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["Marks"]


class Marks:
    """One small file for each rank that ended by itself, in the run's own folder.

    torch's agent tells of one failure only, and gives every other rank half a minute whether it
    was told to end from outside or because one failed.

    Args:
        folder: of the run, on this node.
        restart: how many times the run was restarted before.
    """

    def __init__(self, folder: str, restart: int) -> None:
        self._folder = Path(folder)
        self._prefix = f"ended-{restart}-"

    def tell(self, rank: int, code: int) -> None:
        """That global rank ``rank`` ended with ``code`` (negative: by a signal)."""
        with contextlib.suppress(OSError):  # the folder goes with the command
            part = self._folder / f"part-{os.getpid()}"
            part.write_text(str(code))
            part.replace(self._folder / f"{self._prefix}{rank}")

    def read(self) -> dict[int, int]:
        """Exit codes by global rank."""
        found = {}
        for file in self._folder.glob(f"{self._prefix}*"):
            found[int(file.name.removeprefix(self._prefix))] = int(file.read_text())
        return found

    def anybody_failed(self) -> bool:
        """Whether a rank ended badly that nobody had told to end."""
        return any(self.read().values())
