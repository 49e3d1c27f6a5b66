"""How far a loop is: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Bars", "track"]

T = TypeVar("T")

#: Seconds between two looks at the bar.
_REFRESH = 0.1

#: Seconds to the first line where there is no terminal; the next ones come after twice as many.
_FIRST_LINE = 10.0


def track(
    iterable: Iterable[T], description: str = "", total: int | None = None, *, show: bool
) -> Iterator[T]:
    """Yield the items of ``iterable`` and show on stderr how many there were.

    On a terminal that is a progress bar. Elsewhere it is a line when the loop ends, and while it
    runs one after 10 seconds, 20, 40 and so on, so that a file is not filled.

    Args:
        iterable: a loader, or anything else to loop over.
        description: what is done with the items.
        total: how many items there will be; None: as many as ``len`` says, where it does.
        show: False: nothing is shown, as on other ranks than 0.
    """
    return Bars().track(iterable, description, total, show=show)


class Bars:
    """Loops within loops share a terminal: the bars of those that run at a time are one display.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._display: Progress | None = None
        self._open = 0

    def track(
        self,
        iterable: Iterable[T],
        description: str = "",
        total: int | None = None,
        *,
        show: bool,
    ) -> Iterator[T]:
        """As the function ``track``."""
        if not show or sys.stderr is None:
            yield from iterable
            return
        total = _length(iterable) if total is None else total
        follow = self._follow_bar if _on_terminal() else self._follow_lines
        yield from follow(iterable, description, total)

    def _follow_bar(
        self, iterable: Iterable[T], description: str, total: int | None
    ) -> Iterator[T]:
        clock = self._clock
        display = self._display = self._display or _display()
        if self._open == 0:
            display.start()
        self._open += 1
        task = display.add_task(description, total=total)
        display.refresh()
        count, due = 0, clock() + _REFRESH
        try:
            for item in iterable:
                yield item
                count += 1
                # A look at the clock is all that most items cost.
                if clock() >= due:
                    display.update(task, completed=count, refresh=True)
                    due = clock() + _REFRESH
        finally:
            display.update(task, completed=count, refresh=True)
            display.stop_task(task)
            self._open -= 1
            if self._open == 0:
                display.stop()
                self._display = None
            else:
                # Inner loops come again and again; their end is told by the outer one.
                display.remove_task(task)

    def _follow_lines(
        self, iterable: Iterable[T], description: str, total: int | None
    ) -> Iterator[T]:
        clock = self._clock
        start = clock()
        title = f"{description}: " if description else ""
        of = "" if total is None else f"/{total}"
        count, wait = 0, _FIRST_LINE
        ended = False
        self._open += 1
        try:
            for item in iterable:
                yield item
                count += 1
                elapsed = clock() - start
                if elapsed >= wait and count != total:
                    _say(f"{title}{count}{of} in {_time(elapsed)}{_rest(count, total, elapsed)}")
                    while wait <= elapsed:
                        wait *= 2
            ended = True
        finally:
            self._open -= 1
            elapsed = clock() - start
            # Of short inner loops, of which there may be thousands, the outer one tells.
            if self._open == 0 or elapsed >= _FIRST_LINE:
                how = "in" if ended else "when it stopped after"
                _say(f"{title}{count}{of} {how} {_time(elapsed)}")


def _length(iterable: Iterable[object]) -> int | None:
    try:
        return len(iterable)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # as loaders of iterable datasets answer
        return None


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _display() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        # Without a thread: a loader's workers may be forked at any time, and would inherit what
        # it had locked.
        auto_refresh=False,
        # What is printed meanwhile appears above the bar, unless it goes somewhere else.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
    )


def _say(line: str) -> None:
    # A reader that has gone is no reason to end a training.
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _rest(count: int, total: int | None, elapsed: float) -> str:
    if not total or count > total:
        return ""
    return f", about {_time(elapsed / count * (total - count))} to go"
