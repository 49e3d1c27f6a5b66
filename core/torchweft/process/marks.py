"""How the guards of one node tell each other, and the command, how their ranks ended."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["Marks"]

_PREFIX = "ended-"


class Marks:
    """One small file for each rank that ended by itself, in the run's own folder.

    torch's agent tells of one failure only, and gives every other rank half a minute whether it
    was told to end from outside or because one failed.

    Args:
        folder: of the run, on this node.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def tell(self, rank: int, code: int) -> None:
        """That global rank ``rank`` ended with ``code`` (negative: by a signal)."""
        with contextlib.suppress(OSError):  # the folder goes with the command
            part = self._folder / f"part-{os.getpid()}"
            part.write_text(str(code))
            part.replace(self._folder / f"{_PREFIX}{rank}")

    def read(self) -> dict[int, int]:
        """Exit codes by global rank."""
        found = {}
        for file in self._folder.glob(f"{_PREFIX}*"):
            found[int(file.name.removeprefix(_PREFIX))] = int(file.read_text())
        return found

    def clear(self) -> None:
        """Forget them, before other ranks begin."""
        for file in self._folder.glob(f"{_PREFIX}*"):
            file.unlink()

    def anybody_failed(self) -> bool:
        """Whether a rank ended badly that nobody had told to end."""
        return any(self.read().values())
