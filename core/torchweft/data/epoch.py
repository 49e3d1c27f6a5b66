"""Which epoch a loader draws: counted by itself, unless the user counts."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import Any

from torchweft.errors import InvalidRequest

__all__ = ["EpochCounter", "HearsEpoch", "tell_epoch"]


class HearsEpoch:
    """Takes the number of the epoch, and counts how often it was told one.

    The count tells a user's ``set_epoch(3)`` from a 3 that was there before. One that draws from
    another sampler tells it to that one too.
    """

    epoch: int = 0
    told: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn next."""
        self.epoch = epoch
        self.told += 1


class EpochCounter:
    """Tells samplers and datasets the number of the epoch, at the start of each.

    ``parts`` are the things that a loader draws from. Every one that has ``set_epoch``, or has a
    sampler inside that does, is told 0, 1, 2, … A user who calls ``set_epoch(n)`` on one of them
    is heard through its attribute ``epoch``: the next epoch is ``n``, and the count goes on from
    there. One that is not torchweft's is heard when that attribute has changed; where it has no
    such attribute, it follows the count.
    """

    def __init__(self, *parts: Any) -> None:
        self._parts = parts
        # A sampler that was resumed before its loader was set up starts where it stands.
        self._next = max([0, *(_epoch(part) or 0 for part in self._listeners())])
        self._running: int | None = None
        self._seen = self._look()

    def start(self) -> int:
        """Begin an epoch: tell its number to all, and return it."""
        epoch = self._asked()
        if epoch is None:
            epoch = self._next
        self.set(epoch)
        self._next = epoch + 1
        self._running = epoch
        return epoch

    def end(self) -> None:
        """The epoch that began last has been drawn to its end."""
        self._running = None

    @property
    def idle(self) -> bool:
        """Whether no epoch is under way."""
        return self._running is None

    @property
    def current(self) -> int:
        """The epoch to go on with: the one that began and was not ended, or else the next one."""
        if self._running is not None:
            return self._running
        asked = self._asked()
        return self._next if asked is None else asked

    def set(self, epoch: int) -> None:
        """Make ``epoch`` (0 or more) the next one, whatever was asked for before."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise InvalidRequest(f"set_epoch({epoch!r}): an epoch is a whole number, 0 or more")
        heads = {id(head): head for part in self._parts for head in _heads(part)}
        for head in heads.values():
            head.set_epoch(epoch)
        self._next = epoch
        self._running = None
        self._seen = self._look()

    def _listeners(self) -> list[Any]:
        found = {id(held): held for part in self._parts for held in _listening(part)}
        return list(found.values())

    def _look(self) -> list[tuple[Any, int | None, int]]:
        return [(part, _epoch(part), getattr(part, "told", 0)) for part in self._listeners()]

    def _asked(self) -> int | None:
        """The epoch that the user set since the last look, if he did."""
        for before, now in zip(self._seen, self._look(), strict=True):
            if now != before:
                return now[1]
        return None


def tell_epoch(part: Any, epoch: int) -> None:
    """Tell ``part``, and the samplers inside it, which epoch comes; those that want to know."""
    for head in _heads(part):
        head.set_epoch(epoch)


def _heads(part: Any) -> Iterator[Any]:
    """Those to tell: what is inside of a sampler of ours hears it from there."""
    for listener in _listening(part):
        yield listener
        if isinstance(listener, HearsEpoch):
            return


def _listening(part: Any) -> Iterator[Any]:
    seen: set[int] = set()
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        if callable(getattr(part, "set_epoch", None)):
            yield part
        part = getattr(part, "sampler", None)


def _epoch(part: Any) -> int | None:
    epoch = getattr(part, "epoch", None)
    # A number below 0 stands for "not begun" in some samplers.
    return int(epoch) if isinstance(epoch, Integral) and int(epoch) >= 0 else None
