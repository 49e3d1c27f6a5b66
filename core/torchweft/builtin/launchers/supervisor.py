"""Watches the ranks of one node: the first failure ends them all and is told once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from torchweft.errors import RankFailed

__all__ = ["Child", "Failure", "Supervisor", "first_failure", "read_failures"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one rank ended badly."""

    rank: int
    exitcode: int
    message: str = ""
    trace: str = ""
    time_ns: int = 0
    lost_peer: bool = False

    def cause(self) -> str:
        """``"ValueError: …"``, ``"killed by signal 9 (SIGKILL)"`` or ``"exit status 3"``."""
        if self.message:
            return self.message
        if self.exitcode < 0:
            return f"killed by signal {-self.exitcode} ({_signal_name(-self.exitcode)})"
        return f"ended with exit status {self.exitcode}"

    @property
    def exit_status(self) -> int:
        """What a command that ran this rank ends with."""
        return 128 - self.exitcode if self.exitcode < 0 else self.exitcode


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def read_failures(exitcodes: dict[int, int], error_files: dict[int, Path]) -> list[Failure]:
    """What ranks with these exit codes left in their error files."""
    failures = []
    for rank, exitcode in exitcodes.items():
        extra, message = {}, ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(error_files[rank].read_text(encoding="utf-8"))["message"]
            extra, message = content["extraInfo"], content["message"]
        failures.append(
            Failure(
                rank=rank,
                exitcode=exitcode,
                message=message,
                trace=extra.get("py_callstack", ""),
                time_ns=int(extra.get("time_ns", 0)),
                lost_peer=bool(extra.get("lost_peer", False)),
            )
        )
    return failures


def first_failure(failures: Sequence[Failure]) -> Failure:
    """The cause among several failures: not a rank that merely lost its peer, then the earliest.

    A rank that was killed wrote nothing; it comes before those that then lost it.
    """
    return min(failures, key=lambda f: (f.lost_peer, f.time_ns or 0, f.rank))


def report(failures: Sequence[Failure], world_size: int) -> RankFailed:
    """One report of all failures: the cause with its traceback, the others in one line."""
    first = first_failure(failures)
    lines = [f"rank {first.rank} of {world_size} failed: {first.cause()}"]
    others = [f for f in failures if f is not first]
    if others:
        told = "; ".join(f"rank {f.rank}: {_brief(f.cause())}" for f in others)
        lines.append(f"after it: {told}")
    if first.trace:
        lines += ["", first.trace.rstrip()]
    return RankFailed("\n".join(lines), rank=first.rank, exit_status=first.exit_status or 1)


def _brief(text: str) -> str:
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= 100 else line[:97] + "..."


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
            name = _signal_name(self._signal)
            raise RankFailed(f"ended by {name}", exit_status=128 + self._signal)
        bad = {rank: code for rank, code in codes.items() if code}
        raise report(read_failures(bad, self._error_files), len(self._children))

    def _exitcodes(self) -> dict[int, int | None]:
        return {rank: child.exitcode for rank, child in self._children.items()}

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """End every rank: ask, wait, kill; returns when none is left."""
        deadline = time.monotonic() + _GRACE
        self._send(signum)
        while self._running() and time.monotonic() < deadline:
            time.sleep(_TICK)
        self._send(signal.SIGKILL)
        while self._running():
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
