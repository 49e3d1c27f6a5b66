"""Watches the ranks of a run through their actors: the first failure ends all and is told once."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Any

from torchweft.launching import (
    GRACE,
    LONG_GRACE,
    NOTICE,
    Failure,
    in_main_thread,
    interrupt_patience,
    report,
    respected,
)
from torchweft_ray.guard import Seen
from torchweft_ray.voices import Voices

__all__ = ["Crew", "Member", "ToldToEnd"]

#: Seconds that an actor waits for news.
_NEWS = 0.25
#: Seconds between two looks at everything else.
_TICK = 0.1
#: Seconds in which the cause of a failure shows itself.
_MOMENT = 1.0
#: Seconds in which an actor puts away what it made.
_END = 5.0
#: Bytes that are read ahead of what was typed for rank 0.
_AHEAD = 1 << 20


class ToldToEnd(BaseException):
    """This process got a signal that ends a job; its ranks are gone.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Member:
    """A rank, as this process knows it.

    Attributes:
        actor: that made it.
        node: name of its node, for people.
        seen: what was seen last.
        over: whether it has ended.
        failure: how it failed, if it did.
    """

    def __init__(self, actor: Any, node: str) -> None:
        self.actor = actor
        self.node = node
        self.seen = Seen()
        self.over = False
        self.failure: Failure | None = None


class Crew:
    """A context manager: signals that end a job are noted meanwhile; no rank is left afterwards.

    Args:
        ray: the module.
        members: by global rank.
        pass_on: whether signals that give notice are the ranks'.
        reads: whether what is typed goes to rank 0.
    """

    def __init__(
        self, ray: Any, members: Sequence[Member], *, pass_on: bool = False, reads: bool = False
    ) -> None:
        self._ray = ray
        self._members = members
        self._pass_on = NOTICE if pass_on else ()
        self._reads = reads
        self._typing: Any = None
        self._voices = Voices()
        self._pending: dict[Any, int] = {}
        self._signal: int | None = None
        self._twice = False
        self._notices: list[int] = []
        self._handlers: dict[int, Any] = {}
        self._patience = interrupt_patience()

    def __enter__(self) -> Crew:
        if in_main_thread():
            for number in (*respected(), *self._pass_on):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._put_away()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._pass_on:
            self._notices.append(number)  # Ray may be in the middle of something
            return
        self._twice = self._signal is not None
        self._signal = self._signal or number

    # -- watching --------------------------------------------------------------------------------

    def wait(self) -> None:
        """Return when every rank has ended well.

        Raises ``RankFailed`` and ``ToldToEnd``, when no rank is left.
        """
        self._until(lambda: self._failed() or self._signal is not None)
        if not self._failed() and self._signal is None:
            return
        if self._signal is None:
            # Whoever lost a peer may well be the first to be known.
            self._until(lambda: any(not f.consequence for f in self._failures()), _MOMENT)
        failures = self._failures()
        done = [rank for rank, member in enumerate(self._members) if self._is_done(member)]
        told = self._signal
        self._stop()
        self._voices.close()
        if told is not None:
            raise ToldToEnd(told)
        raise report(failures, len(self._members), done)

    def _failed(self) -> bool:
        return bool(self._failures())

    def _failures(self) -> list[Failure]:
        return [member.failure for member in self._members if member.failure is not None]

    def _is_done(self, member: Member) -> bool:
        return member.failure is None and (member.over or member.seen.done)

    def _until(self, enough: Callable[[], bool], seconds: float = float("inf")) -> None:
        """Look at all ranks until it is enough, none is left, or so many seconds have passed."""
        deadline = time.monotonic() + seconds
        while not enough() and time.monotonic() < deadline:
            for rank, member in enumerate(self._members):
                if not member.over and rank not in self._pending.values():
                    self._pending[member.actor.watch.remote(_NEWS)] = rank
            if not self._pending:
                break
            if self._reads:
                self._type()
            while self._notices:
                self._tell(self._notices.pop(0))
            self._look()
        if not self._pending:
            self._voices.close()

    def _look(self) -> None:
        waiting = list(self._pending)
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=_TICK)
        if ready:
            # Those that came with it, so that no rank is told before another that ended earlier.
            ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for news in ready:
            rank = self._pending.pop(news)
            member = self._members[rank]
            try:
                seen: Seen = self._ray.get(news)
            except self._ray.exceptions.RayError as error:
                member.over = True
                member.failure = member.failure or _lost(rank, member, error)
                continue
            for descriptor, piece in seen.said:
                self._voices.hear(rank, descriptor, piece)
            member.seen = seen
            member.over = seen.code is not None
            if seen.failure is not None:
                member.failure = replace(seen.failure, node=member.node)

    # -- what is typed ---------------------------------------------------------------------------

    def _type(self) -> None:
        """Hand rank 0 what is typed here, not faster than it reads."""
        first = self._members[0]
        if self._typing is not None:
            if not self._ray.wait([self._typing], timeout=0)[0]:
                return
            self._typing = None
        if first.over or first.seen.unread > _AHEAD or not _may_read():
            return
        try:
            if not select.select([0], [], [], 0)[0]:
                return
            words = os.read(0, 1 << 16)
        except (OSError, ValueError):
            words = b""  # it is closed
        self._reads = bool(words)
        self._typing = first.actor.type.remote(words)

    # -- ending ----------------------------------------------------------------------------------

    def _stop(self) -> None:
        """End every rank: ask, wait, kill."""
        if self._signal == signal.SIGINT:
            self._tell(signal.SIGINT)
            self._wait_for_all(self._patience)
        elif self._signal is not None:
            self._tell(self._signal)
            self._wait_for_all(LONG_GRACE)
        self._tell(signal.SIGTERM)
        self._wait_for_all(GRACE)
        self._tell(signal.SIGKILL)
        self._wait_for_all(_END, patient=True)

    def _wait_for_all(self, seconds: float, *, patient: bool = False) -> None:
        # What ranks do from here on is our own doing.
        self._until(lambda: self._twice and not patient, seconds)

    def _tell(self, number: int) -> None:
        for member in self._members:
            if not member.over:
                member.actor.tell.remote(number)

    def result(self) -> bytes:
        """What rank 0 returned, pickled."""
        found: bytes = self._ray.get(self._members[0].actor.result.remote())
        return found

    def _put_away(self) -> None:
        """End every actor, and what it made with it."""
        closing = [member.actor.close.remote() for member in self._members]
        self._ray.wait(closing, num_returns=len(closing), timeout=_END)
        for member in self._members:
            self._ray.kill(member.actor)


def _may_read() -> bool:
    """Whether reading what is typed does not stop this process, as it does in the background."""
    try:
        return not os.isatty(0) or os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return True


def _lost(rank: int, member: Member, error: Exception) -> Failure:
    """An actor that is gone took its rank with it; Ray's own words say why."""
    # Without the lines that tell which actor it was.
    told = [line for line in str(error).splitlines() if not line.startswith("\t")]
    words = " ".join(told)
    return Failure(
        rank=rank,
        exitcode=1,
        message=f"its actor is gone: {type(error).__name__}: {words}",
        time_ns=time.time_ns(),
        node=member.node,
    )
