"""What is available here, found out without torch."""

from __future__ import annotations

import platform
import sys

from torchweft.specs import Availability

__all__ = ["mps"]


def mps() -> Availability:
    """An Apple computer with its own processor has the GPU built in."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Availability(ok=True, count=1)
    return Availability(
        ok=False,
        reason=f"this is {platform.system()} on {platform.machine()}, not an Apple computer with "
        "Apple silicon",
        hint="use accelerator='cpu'",
    )
