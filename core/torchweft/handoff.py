"""What a torchweft command or launcher hands to its ranks: one variable, ``TORCHWEFT_RUN``.

It is JSON and says for which process it was written: the process itself or its children. A
variable that was left over from another run, exported in a shell or inherited by a program that a
rank started, is not this run's and changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torchweft.errors import InvalidRequest

__all__ = ["VARIABLE", "Handoff"]

VARIABLE = "TORCHWEFT_RUN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """What the ranks of one run are told.

    Attributes:
        run_id: of the run.
        launcher: name of the launcher that made the ranks; empty when the script shall make them.
        flags: the flags of ``torchweft run`` that the user gave, by name of ``Fabric``'s argument.
        dry_run: whether one batch of every loader is enough.
        log_dir: folder for each rank's output, where it has a file of its own; empty: the terminal.
        log_stays: whether that folder is still there when the run has ended.
        timeout: seconds that a collective may take; None: as long as the strategy allows.
        pid: the process that this was written for, or None for all children of ``parent``.
        parent: the process whose children this was written for.
    """

    run_id: str
    launcher: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    log_dir: str = ""
    log_stays: bool = True
    timeout: float | None = None
    pid: int | None = None
    parent: int | None = None

    def to_environ(self) -> dict[str, str]:
        """The variable, ready to be put into an environment."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Handoff | None:
        """What was handed to this very process; None when nothing was, or it is stale.

        Raises ``InvalidRequest`` when the variable holds something that nobody here wrote.
        """
        text = environ.get(VARIABLE)
        if not text:
            return None
        try:
            handoff = cls(**json.loads(text))
            if not _sound(handoff):
                raise TypeError("wrong types")
        # RecursionError is what deeply nested brackets end in.
        except (ValueError, TypeError, RecursionError):
            raise InvalidRequest(
                f"the environment variable {VARIABLE} is {_shortened(text)!r}, which "
                f"'torchweft run' never writes; it is not meant to be set by hand: unset {VARIABLE}"
            ) from None
        mine = handoff.pid == os.getpid() or handoff.parent == os.getppid()
        return handoff if mine else None

    @classmethod
    def stale(cls, environ: Mapping[str, str]) -> bool:
        """Whether the environment describes a run to which this process does not belong."""
        return bool(environ.get(VARIABLE)) and cls.read(environ) is None


def _sound(handoff: Handoff) -> bool:
    """Whether the fields have their types, which JSON does not promise."""
    return (
        isinstance(handoff.run_id, str)
        and isinstance(handoff.launcher, str)
        and isinstance(handoff.flags, dict)
        and isinstance(handoff.dry_run, bool)
        and isinstance(handoff.log_dir, str)
        and isinstance(handoff.log_stays, bool)
        and isinstance(handoff.timeout, int | float | None)
        and isinstance(handoff.pid, int | None)
        and isinstance(handoff.parent, int | None)
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:79]}…"
