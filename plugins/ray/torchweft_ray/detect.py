"""Whether launcher ``ray`` has made this process. Free of torch and of Ray."""

from __future__ import annotations

from collections.abc import Mapping

from torchweft.launching import Handoff
from torchweft.specs import Detection

__all__ = ["made"]


def made(environ: Mapping[str, str]) -> Detection | None:
    """A rank that an actor of launcher ``ray`` started."""
    handoff = Handoff.read(environ)
    if handoff is None or handoff.launcher != "ray":
        return None
    return Detection(
        reason="this process is a rank started by launcher 'ray'",
        world_size=int(environ["WORLD_SIZE"]),
        processes_per_node=int(environ["LOCAL_WORLD_SIZE"]),
    )
