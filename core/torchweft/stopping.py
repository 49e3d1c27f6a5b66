"""Being told to stop, and all ranks doing so at the same step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from torchweft import process
from torchweft.api import Collectives

__all__ = ["Stopping"]


class Stopping:
    """Whether a run was told to stop, as all of its ranks see it.

    From its making on ``SIGTERM`` and what schedulers send before they end a job (``SIGUSR1``,
    ``SIGUSR2``) are noted in place of ending this process; a handler that was there is called too.
    Make it, and ask it, in every process of the run alike.

    Every question begins one to the other processes and answers with what the one before it found,
    which arrived while the step was computed: nobody waits, and all get the same answer.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._told = False
        self._stops = False
        self._answer: Callable[[], bool] | None = None
        if process.in_main_thread():  # only that one gets signals
            process.mind_end(self._handler(signal.SIGTERM))
            for number in process.NOTICE:
                signal.signal(number, self._handler(number))
            process.record_minding()

    def _handler(self, number: int) -> Callable[[int, FrameType | None], None]:
        before: Any = signal.getsignal(number)

        def note(number: int, frame: FrameType | None) -> None:
            self._told = True
            if callable(before):
                before(number, frame)

        return note

    def ask(self) -> bool:
        """Whether any process had been told when all of them asked the time before."""
        if not self._stops:
            if self._answer is not None:
                self._stops = self._answer()
            if self._stops:
                process.record_stopping()
            else:
                self._answer = self._collectives.begin_any(self._told)
        return self._stops
