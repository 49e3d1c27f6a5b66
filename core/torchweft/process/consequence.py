"""What a rank prints that only lost another one, where each rank prints for itself."""

from __future__ import annotations

import os
import sys
import textwrap
from types import TracebackType

from torchweft.process.failure import lost_peer, message_of
from torchweft.process.files import write_error

__all__ = ["shorten_lost_peers"]

#: Characters of torch's own message, which has advice behind what happened.
_WIDTH = 150


def shorten_lost_peers(rank: int, world_size: int) -> None:
    """Tell in a line, from here on, that this rank ends because another one is gone.

    Nobody collects what the ranks of a launcher outside print: without this the traceback of the
    one that failed stands among those of all that lost it.
    """
    before = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        # A refused connection of the script's own is an OSError; torch's are RuntimeErrors.
        lost = isinstance(error, RuntimeError) and lost_peer(error)
        if not lost or os.environ.get("TORCHWEFT_TRACE") == "1":
            before(kind, error, trace)
        else:
            message = textwrap.shorten(message_of(error), _WIDTH, placeholder=" …")
            write_error(
                f"torchweft: rank {rank} of {world_size} ends because it lost another rank, which "
                f"says why it failed ({message}); TORCHWEFT_TRACE=1 shows where\n"
            )

    sys.excepthook = excepthook
