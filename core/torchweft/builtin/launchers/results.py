"""Bringing rank 0's result back to the process that called ``fabric.launch(function)``."""

from __future__ import annotations

import os
import pickle
import time
from multiprocessing.connection import Connection, wait
from typing import Any

from torchweft.api import pack_result

__all__ = ["Results", "send_result"]

#: Bytes that tell how many follow.
_HEADER = 8
_CHUNK = 1 << 20


class Results:
    """Reads what rank 0 sends, bit by bit, while the ranks are watched.

    Never waits for more than was asked: a rank may be killed in the middle of sending, and
    processes that it made may hold its end of the pipe open for ever.
    """

    def __init__(self, receiver: Connection[Any, Any]) -> None:
        self._receiver = receiver
        os.set_blocking(receiver.fileno(), False)
        self._data = bytearray()
        self._open = True

    def idle(self, seconds: float) -> None:
        """Read what comes within ``seconds``."""
        if not self._open:
            # Nothing more will come; the supervisor only waits for the processes to end.
            time.sleep(seconds)
            return
        deadline = time.monotonic() + seconds
        if wait([self._receiver], seconds):
            while self._read() and time.monotonic() < deadline:
                pass

    def _read(self) -> bool:
        """Whether there was something."""
        try:
            chunk = os.read(self._receiver.fileno(), _CHUNK)
        except BlockingIOError:
            return False
        self._data += chunk
        self._open = bool(chunk)
        return self._open

    def take(self) -> Any:
        """The result, once every rank has ended well; None where rank 0 ended before it."""
        while self._open and self._read():
            pass
        size = int.from_bytes(self._data[:_HEADER], "big")
        if len(self._data) < _HEADER + size or not self._data:
            return None
        return pickle.loads(memoryview(self._data)[_HEADER:])


def send_result(result: Any, sender: Connection[Any, Any]) -> None:
    """Send what rank 0 returned.

    Raises ``TorchweftError``, which names the type, when it cannot be pickled.
    """
    data = pack_result(result)
    descriptor = sender.fileno()
    for part in (len(data).to_bytes(_HEADER, "big"), data):
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    sender.close()
