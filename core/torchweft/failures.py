"""How ranks failed, and one report of it: the cause with its traceback, the others in a line."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchweft.errors import RankFailed

__all__ = ["Failure", "first_failure", "read_failure", "report", "signal_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one rank ended badly.

    Attributes:
        rank: global rank.
        exitcode: negative for a signal.
        message: ``"ValueError: …"``; empty where it told nothing.
        trace: of the exception, as Python prints it.
        time_ns: when it told.
        lost_peer: whether it merely lost another rank.
        node: name of its node; empty where there is one alone.
    """

    rank: int
    exitcode: int
    message: str = ""
    trace: str = ""
    time_ns: int = 0
    lost_peer: bool = False
    node: str = ""

    def cause(self) -> str:
        """``"ValueError: …"``, ``"killed by signal 9 (SIGKILL)"`` or ``"exit status 3"``."""
        if self.message:
            return self.message
        if self.exitcode < 0:
            return f"killed by signal {-self.exitcode} ({signal_name(-self.exitcode)})"
        return f"ended with exit status {self.exitcode}"

    @property
    def consequence(self) -> bool:
        """Whether another rank's end explains it: a lost peer, or being asked to end."""
        return self.lost_peer or self.exitcode == -signal.SIGTERM

    @property
    def exit_status(self) -> int:
        """What a command that ran this rank ends with."""
        return 128 - self.exitcode if self.exitcode < 0 else self.exitcode


def signal_name(number: int) -> str:
    """``"SIGKILL"`` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def read_failure(rank: int, exitcode: int, error_file: Path) -> Failure:
    """What a rank that ended with ``exitcode`` left in its error file, if it left anything."""
    extra: dict[str, Any] = {}
    message = ""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(error_file.read_text(encoding="utf-8"))["message"]
        extra, message = content["extraInfo"], content["message"]
    return Failure(
        rank=rank,
        exitcode=exitcode,
        message=message,
        trace=extra.get("py_callstack", ""),
        time_ns=int(extra.get("time_ns", 0)),
        lost_peer=bool(extra.get("lost_peer", False)),
    )


def first_failure(failures: Sequence[Failure]) -> Failure:
    """The cause among several failures: the earliest that is not merely a consequence.

    A rank that lost its peer, or was asked to end, comes last. One that was killed wrote no time;
    it comes before those that then lost it.
    """

    def order(failure: Failure) -> tuple[bool, int, int]:
        return failure.consequence, failure.time_ns, failure.rank

    return min(failures, key=order)


def report(failures: Sequence[Failure], world_size: int, done: Collection[int] = ()) -> RankFailed:
    """One report of all failures: the cause with its traceback, the others in one line.

    ``done``: ranks that had ended well, or were about to; others may have waited for them in vain.
    """
    cause = first_failure(failures).cause()
    # Which of those that failed alike was a moment earlier tells nothing.
    first = min((f for f in failures if f.cause() == cause), key=lambda f: f.rank)
    where = f" on node {first.node}" if first.node else ""
    lines = [f"rank {first.rank} of {world_size}{where} failed: {cause}"]
    others = [f for f in failures if f is not first]
    same = [str(f.rank) for f in others if f.cause() == cause]
    if same:
        lines.append(f"and so did rank {', '.join(same)}")
    told = [f"rank {f.rank}: {_brief(f.cause())}" for f in others if f.cause() != cause]
    if told:
        lines.append(f"after it: {'; '.join(told)}")
    left = sorted(set(done) - {f.rank for f in failures})
    if first.lost_peer and left:
        lines.append(
            f"done before, without an error: rank {', '.join(map(str, left))}; every rank has to "
            "take part in every collective operation"
        )
    if first.trace:
        lines += ["", first.trace.rstrip()]
    return RankFailed("\n".join(lines), rank=first.rank, exit_status=first.exit_status or 1)


def _brief(text: str) -> str:
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= 100 else line[:97] + "..."
