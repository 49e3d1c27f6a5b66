"""One process on one device."""

from __future__ import annotations

from torchweft.api import Strategy

__all__ = ["SingleDevice"]


class SingleDevice(Strategy):
    """What the base class does: torch's own calls, and nobody to talk to."""

    name = "single_device"
    processes = "one"
