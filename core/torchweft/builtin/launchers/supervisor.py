"""Watches the ranks of one node: the first failure ends them all and is told once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Protocol

from torchweft.errors import RankFailed
from torchweft.failures import read_failure, report, signal_name

__all__ = ["Child", "Supervisor"]

#: Seconds between two looks at the ranks.
_TICK = 0.02
#: Seconds that the other ranks have to end by themselves once they were asked to.
_GRACE = 2.0


class Child(Protocol):
    """A process that can be watched."""

    @property
    def pid(self) -> int | None:
        """Its process id."""

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative for a signal."""


class Supervisor:
    """Waits for ranks and ends all of them when one fails or a signal arrives.

    Args:
        children: by global rank.
        error_files: by global rank, where each writes its error.
    """

    def __init__(self, children: dict[int, Child], error_files: dict[int, Path]) -> None:
        self._children = children
        self._error_files = error_files
        self._signal: int | None = None

    def wait(self, idle: Callable[[float], None] = time.sleep) -> None:
        """Return when every rank has ended with status 0.

        ``idle(seconds)`` is called between looks and may do something useful meanwhile. Raises
        ``RankFailed``; ``KeyboardInterrupt`` when interrupted from the keyboard.
        """
        with self._signals():
            try:
                while True:
                    codes = self._exitcodes()
                    if any(code not in (None, 0) for code in codes.values()):
                        break
                    if all(code == 0 for code in codes.values()):
                        return
                    if self._signal is not None:
                        break
                    idle(_TICK)
            except BaseException:
                self.stop()
                raise
            self._end_after(codes)

    def _end_after(self, codes: dict[int, int | None]) -> None:
        if self._signal is None:
            # Whoever lost a peer fails within moments of it; what follows is our own doing.
            time.sleep(_TICK)
            codes = self._exitcodes()
        self.stop(self._signal or signal.SIGTERM)
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            name = signal_name(self._signal)
            raise RankFailed(f"ended by {name}", exit_status=128 + self._signal)
        bad = [
            read_failure(rank, code, self._error_files[rank])
            for rank, code in codes.items()
            if code
        ]
        raise report(bad, len(self._children))

    def _exitcodes(self) -> dict[int, int | None]:
        return {rank: child.exitcode for rank, child in self._children.items()}

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """End every rank: ask, wait, kill; returns when none is left."""
        deadline = time.monotonic() + _GRACE
        if signum == signal.SIGINT:
            # The terminal sent it to every process of the group, and twice would interrupt what
            # the first one made a rank do.
            self._wait_until(time.monotonic() + _GRACE / 4)
            signum = signal.SIGTERM
        self._send(signum)
        self._wait_until(deadline)
        self._send(signal.SIGKILL)
        while self._running():
            time.sleep(_TICK)

    def _wait_until(self, deadline: float) -> None:
        while self._running() and time.monotonic() < deadline:
            time.sleep(_TICK)

    def _running(self) -> list[Child]:
        return [child for child in self._children.values() if child.exitcode is None]

    def _send(self, signum: int) -> None:
        for child in self._running():
            with contextlib.suppress(ProcessLookupError):
                if child.pid is not None:
                    os.kill(child.pid, signum)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note the signals that end a job; a second Ctrl-C kills at once."""

        def note(signum: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                self._send(signal.SIGKILL)
            self._signal = signum

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            before[signum] = signal.signal(signum, note)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
