"""What ranks print, line by line on this process's terminal, each with its rank before it."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Any

__all__ = ["Voices"]

#: A line with its end; a carriage return ends one too, as a progress bar writes it.
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\n|\r(?!\Z))")


class Voices:
    """Puts together lines that arrive in pieces; no line is mixed with another rank's."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], bytes] = {}

    def hear(self, rank: int, descriptor: int, piece: bytes) -> None:
        """Print every line that is whole now; ``descriptor``: 1 or 2, as the rank wrote it."""
        held = self._held.pop((rank, descriptor), b"") + piece
        end = 0
        for line in _LINE.finditer(held):
            _print(rank, descriptor, line.group())
            end = line.end()
        if held[end:]:
            self._held[rank, descriptor] = held[end:]

    def close(self) -> None:
        """Print what was begun and has no end."""
        for (rank, descriptor), rest in sorted(self._held.items()):
            _print(rank, descriptor, rest.rstrip(b"\r") + b"\n")
        self._held.clear()


def _print(rank: int, descriptor: int, line: bytes) -> None:
    stream: Any = sys.stdout if descriptor == 1 else sys.stderr
    text = f"[rank {rank}] {line.decode(errors='replace')}"
    # A reader that is gone ends no run.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.write(text)
        stream.flush()
