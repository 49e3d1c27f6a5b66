"""A dry run: everything that a script does, with one batch of every loader."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

__all__ = ["DryRun"]


class DryRun:
    """Cuts loaders to one batch, and ends the run where one of them would start again.

    Args:
        tells: whether this process says so on stderr.
    """

    def __init__(self, tells: bool) -> None:
        self._tells = tells
        self._count = 0
        self._reached = 0

    def loader(self) -> Callable[[Callable[[], Iterator[Any]]], Iterator[Any]]:
        """For one loader: what stands between the start of an iteration and its batches."""
        self._count += 1
        return _OneBatch(self)

    def reached(self) -> None:
        """One more loader gives its batch."""
        self._reached += 1

    def end(self) -> None:
        """End this process well, as every rank does at this point of its script."""
        if self._tells:
            print(
                f"torchweft: dry run: a batch went through of {self._reached} of the {self._count} "
                "loader(s) set up; stopped where one of them would start again",
                file=sys.stderr,
            )
        sys.exit(0)


class _OneBatch:
    def __init__(self, run: DryRun) -> None:
        self._run = run
        self._passed = False

    def __call__(self, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        if self._passed:
            self._run.end()
        self._passed = True
        self._run.reached()
        return islice(start(), 1)
