"""Watches the ranks of one node: the first failure ends them all and is told once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from torchweft import process
from torchweft.failures import Failure, read_failure, report, signal_name

__all__ = ["Child", "Supervisor", "ToldToEnd"]

#: Seconds between two looks at the ranks.
_TICK = 0.02
#: Seconds in which the cause of a failure shows itself.
_MOMENT = 1.0


class Child(Protocol):
    """A process that can be watched."""

    @property
    def pid(self) -> int | None:
        """Its process id."""

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative for a signal."""


class ToldToEnd(BaseException):
    """This process got a signal that ends a job; its ranks are gone.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal_name(number)}")
        self.number = number


class Supervisor:
    """Waits for ranks and ends all of them when one fails or a signal arrives.

    A context manager: from its beginning on, signals that end a job are noted rather than obeyed,
    so that none can come between two ranks that are being made; at its end no rank is left.

    Args:
        error_files: by global rank, where each writes its error.
        pass_on: further signals that are the ranks' rather than this process's.

    Attributes:
        children: by global rank; whoever makes a rank puts it here at once.
    """

    def __init__(
        self, error_files: dict[int, Path], *, pass_on: Iterable[signal.Signals] = ()
    ) -> None:
        self.children: dict[int, Child] = {}
        self._error_files = error_files
        self._pass_on = tuple(pass_on)
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._patience = process.interrupt_patience()
        self._oom_kills = process.oom_kills()

    def __enter__(self) -> Supervisor:
        # Only a main thread gets signals.
        if process.in_main_thread():
            for number in (*process.respected(), *self._pass_on):
                self._handlers[number] = signal.signal(number, self._note)
            # Whoever ignores it, or waits for every child, would take the ranks' exit statuses.
            self._handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._give_signals_back()

    def disown(self) -> None:
        """In a rank that was forked out of this process: it supervises nobody."""
        self.children = {}
        self._give_signals_back()

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            # None: it was set by something that is not Python, and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._pass_on:
            self._send(number)
            return
        if self._signal is not None:
            self._send(signal.SIGKILL)  # asked twice
        self._signal = number

    # -- watching --------------------------------------------------------------------------------

    def wait(self, idle: Callable[[float], None] = time.sleep) -> None:
        """Return when every rank has ended with status 0.

        ``idle(seconds)`` is called between looks and may do something useful meanwhile. Raises
        ``RankFailed`` and ``ToldToEnd``, when no rank is left.
        """
        while True:
            codes = self._exitcodes()
            if any(code not in (None, 0) for code in codes.values()) or self._signal is not None:
                break
            if all(code == 0 for code in codes.values()):
                return
            idle(_TICK)
        if self._signal is None:
            codes = self._once_the_cause_is_known()
        told = self._signal
        self.stop(told)
        if told is not None:
            raise ToldToEnd(told)
        failures, done = self._failures(codes), self._done(codes)
        meanwhile = self._meanwhile(codes, done)
        killed = process.oom_kills() - self._oom_kills
        raise report(failures, len(self.children), done, meanwhile, oom_kills=killed)

    def _once_the_cause_is_known(self) -> dict[int, int | None]:
        """The exit codes that tell it; what ranks do after it is our own doing."""
        deadline = time.monotonic() + _MOMENT
        while True:
            # Whoever lost a peer fails within moments of it, and may well be the first to be gone.
            time.sleep(_TICK)
            codes = self._exitcodes()
            known = any(not failure.consequence for failure in self._failures(codes))
            if known or None not in codes.values() or time.monotonic() > deadline:
                return codes

    def _failures(self, codes: dict[int, int | None]) -> list[Failure]:
        bad = {rank: code for rank, code in codes.items() if code}
        for rank, file in self._error_files.items():
            # It has told why, and is still on its way out.
            if codes[rank] is None and file.exists():
                bad[rank] = 1
        return [read_failure(rank, code, self._error_files[rank]) for rank, code in bad.items()]

    def _done(self, codes: dict[int, int | None]) -> list[int]:
        files = {rank: process.done_file(file) for rank, file in self._error_files.items()}
        return [rank for rank, code in codes.items() if code == 0 or files[rank].exists()]

    def _meanwhile(self, codes: dict[int, int | None], done: list[int]) -> dict[int, str]:
        """What those were doing that ran until they were told to end."""
        told = {}
        for rank, file in self._error_files.items():
            stacks = process.read_stacks(file)
            if stacks is not None and codes[rank] is None and rank not in done:
                told[rank] = stacks.doing()
        return {rank: doing for rank, doing in told.items() if doing}

    def _exitcodes(self) -> dict[int, int | None]:
        return {rank: child.exitcode for rank, child in self.children.items()}

    # -- ending ----------------------------------------------------------------------------------

    def stop(self, told: int | None = None) -> None:
        """End every rank: ask, wait, kill; returns when none is left.

        ``told``: the signal that this process got; without one the ranks are ended because one
        failed.
        """
        if told == signal.SIGINT:
            self._wait(self._patience)
        elif told is not None:
            self._send(told)
            self._wait(process.LONG_GRACE)
        self._send(signal.SIGTERM)
        self._wait(process.GRACE)
        self._send(signal.SIGKILL)
        while self._running():
            time.sleep(_TICK)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._running() and time.monotonic() < deadline:
            time.sleep(_TICK)

    def _running(self) -> list[Child]:
        return [child for child in self.children.values() if child.exitcode is None]

    def _send(self, number: int) -> None:
        for child in self._running():
            with contextlib.suppress(ProcessLookupError):
                if child.pid is not None:
                    os.kill(child.pid, number)
