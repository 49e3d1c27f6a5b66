"""The signals that end a job, and keeping them away while processes are made."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

__all__ = [
    "ENDING",
    "GRACE",
    "LONG_GRACE",
    "NOTICE",
    "exit_on_signals",
    "held_back",
    "in_main_thread",
    "interrupt_patience",
    "let_in",
    "respected",
]

#: What a terminal, a shell, a scheduler or an administrator sends to end a job.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
#: What a scheduler sends before it ends a job, for the script to save what it has.
NOTICE = (signal.SIGUSR1, signal.SIGUSR2)
#: Seconds that a rank has to end by itself once another one failed.
GRACE = 2.0
#: Seconds that it has when the job was told to end: it may be saving what it has.
LONG_GRACE = 30.0


def interrupt_patience() -> float:
    """Seconds after an interrupt in which ranks are left to end by themselves.

    A terminal sends Ctrl-C to every process of a job, and a second signal would interrupt what the
    first one made a rank do; who sits there can press it again. Without a terminal it may have
    been sent to this process alone.
    """
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return GRACE
    try:
        return LONG_GRACE if os.tcgetpgrp(terminal) == os.getpgrp() else GRACE
    except OSError:
        return GRACE
    finally:
        os.close(terminal)


def in_main_thread() -> bool:
    """Whether handlers can be set here."""
    return threading.current_thread() is threading.main_thread()


def respected() -> list[signal.Signals]:
    """Those that are not ignored: ``nohup`` and a shell's ``&`` mean what they say."""
    return [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals that arrive meanwhile wait, so that no half-made process gets one.

    A process that is forked meanwhile starts with them held back and leaves the block by itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*ENDING, *NOTICE))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_in(number: int) -> None:
    """Let a signal in that whoever made this process may have held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def exit_on_signals(at_last: Callable[[], object] | None = None) -> None:
    """End this process with the status of a shell when it is told to end.

    It ends in Python's way; with ``at_last``, at once behind that call: in the middle of an import
    a library may take the exception for its own, or print what it makes of it.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        if at_last is None:
            raise SystemExit(128 + number)
        try:
            at_last()
        finally:
            os._exit(128 + number)

    for number in respected():
        signal.signal(number, leave)
