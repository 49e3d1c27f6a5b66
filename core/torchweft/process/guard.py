"""A process that stands between a rank and whoever watches ranks.

torch's agent waits for every rank to return from a function, which one that calls ``os._exit(0)``
never does, and a fork server outlives the command that started it for as long as a rank runs. The
guard is what they see of the rank: it ends as the rank ended, passes signals on, and ends the rank
when the command is gone.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from multiprocessing.connection import wait
from types import FrameType
from typing import NoReturn

from torchweft.process.begin import detach_from_parent, die_with_parent
from torchweft.process.files import flush_streams
from torchweft.process.marks import Marks
from torchweft.process.signals import (
    ENDING,
    GRACE,
    NOTICE,
    held_back,
    interrupt_patience,
    let_in,
    respected,
)

__all__ = ["end_like", "fork_guarded"]


def fork_guarded(
    *,
    supervisor: int | None = None,
    pass_on: bool = True,
    marks: Marks | None = None,
) -> int | None:
    """Fork the rank out of this process. None in the rank; in the guard the rank's exit code.

    Args:
        supervisor: a file descriptor that becomes readable when nobody waits for the rank any
            more.
        pass_on: whether signals for the guard are the rank's, which did not get them by itself.
        marks: where guards tell each other how their ranks ended.

    The exit code is negative for a signal. A guard that was told to end ends with its rank. Call
    it in the main thread.
    """
    guard = os.getpid()
    flush_streams()
    with held_back():
        pid = os.fork()
        if pid == 0:
            die_with_parent(guard)
            detach_from_parent()
            return None
        watch = _Watch(pid, supervisor, pass_on, marks)
    let_in(signal.SIGINT)  # a fork server holds it back
    code = watch.until_the_end()
    if watch.told:
        end_like(code)
    watch.close()
    if marks is not None:
        marks.tell(int(os.environ["RANK"]), code)
    return code


class _Watch:
    """A guard's view of its rank."""

    def __init__(
        self, pid: int, supervisor: int | None, pass_on: bool, marks: Marks | None
    ) -> None:
        self._pid = pid
        self._supervisor = supervisor
        self._pass_on = pass_on
        self._marks = marks
        self._asked: list[int] = []
        self._told_at: float | None = None
        self._interrupted = False
        self._patience = interrupt_patience()
        self._wake, alarm = os.pipe()
        for end in (self._wake, alarm):
            os.set_blocking(end, False)
        self._alarm = alarm
        ignored = set(ENDING) - set(respected())
        minded = {signal.SIGCHLD, *ENDING, *NOTICE} - ignored
        self._handlers = {number: signal.signal(number, self._note) for number in minded}
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)

    @property
    def told(self) -> bool:
        """Whether somebody asked for the end."""
        return self._told_at is not None

    def close(self) -> None:
        """Mind no signal any more."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._wake)
        os.close(self._alarm)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._asked.append(number)

    def until_the_end(self) -> int:
        """Wait for the rank; returns its exit code."""
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            self._wait()
            self._pass_signals_on()

    def _wait(self) -> None:
        things = [self._wake, *([] if self._supervisor is None else [self._supervisor])]
        # Nothing but a signal or the supervisor's end matters until somebody asked for an end.
        ready = wait(things, None if self._told_at is None else 0.05)
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
        if self._supervisor in ready:
            self._supervisor = None
            self._send(signal.SIGKILL)

    def _pass_signals_on(self) -> None:
        now = time.monotonic()
        while self._asked:
            number = self._asked.pop(0)
            if self._told_at is None and number in ENDING:
                self._told_at = now
                self._interrupted = number == signal.SIGINT and self._pass_on
            if number != signal.SIGINT and self._pass_on:
                self._send(number)
        if self._told_at is None:
            return
        waited = now - self._told_at
        if waited > GRACE and self._marks is not None and self._marks.anybody_failed():
            self._send(signal.SIGKILL)
        elif self._interrupted and waited > self._patience:
            self._interrupted = False
            self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)


def end_like(code: int) -> NoReturn:
    """End this process as another one ended, by the same signal or with the same status."""
    if code < 0:
        number = -code
        # One memory dump of the rank is enough.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(code if code >= 0 else 128 - code)
