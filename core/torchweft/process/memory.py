"""Whether the kernel has ended a process because memory ran out."""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["oom_kills"]

_COUNTERS = Path("/proc/vmstat")


def oom_kills() -> int:
    """How many processes of this computer, or of its containers, the kernel has ended so far.

    0 where the system does not count them.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _COUNTERS.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
