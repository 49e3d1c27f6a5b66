"""Whether ``torch_xla.launch`` has made this process for a run. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping

from torchweft.specs import Detection

__all__ = ["MARK", "launched"]

#: Set in a process that launcher ``xla_launch`` has made, to the id of its run.
MARK = "TORCHWEFT_XLA_LAUNCH"


def launched(environ: Mapping[str, str]) -> Detection | None:
    """A rank of launcher ``xla_launch``."""
    run = environ.get(MARK)
    # A process that such a rank starts inherits the mark, and is no rank.
    if not run or environ.get("TORCHELASTIC_RUN_ID") != run or "LOCAL_WORLD_SIZE" not in environ:
        return None
    return Detection(
        reason="this process is a rank started by launcher 'xla_launch'",
        world_size=int(environ["WORLD_SIZE"]),
        processes_per_node=int(environ["LOCAL_WORLD_SIZE"]),
    )
