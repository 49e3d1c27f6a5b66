"""How ranks failed, and one report of it: the cause with its traceback, the others in a line."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torchweft.errors import RankFailed, listed
from torchweft.process.stacks import read_stacks

#: The line of a library's source at which an error was made.
_SOURCE = re.compile(r"\[[^\]\s]*\.(cc|cpp|h):\d+\] ?")
#: Exit codes of signals by which a process says that its memory or its code is broken.
_CRASHES = {
    -number
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)
}

__all__ = ["Failure", "first_failure", "read_failure", "report", "signal_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one rank ended badly.

    Attributes:
        rank: global rank.
        exitcode: negative for a signal.
        message: ``"ValueError: …"``; empty where it told nothing.
        trace: of the exception, as Python prints it; of a crash, the stacks.
        time_ns: when it told.
        lost_peer: whether it merely lost another rank.
        node: name of its computer; empty where it never came to be a rank.
        pid: its process id there; 0 where it is not known.
        doing: where it was when it was told to end.
        world_size: ranks in all, as it was told; 0 where it told nothing.
    """

    rank: int
    exitcode: int
    message: str = ""
    trace: str = ""
    time_ns: int = 0
    lost_peer: bool = False
    node: str = ""
    pid: int = 0
    doing: str = ""
    world_size: int = 0

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
    stacks = read_stacks(error_file)
    crashed = stacks is not None and exitcode in _CRASHES
    return Failure(
        rank=rank,
        exitcode=exitcode,
        message=message,
        trace=extra.get("py_callstack", stacks.text if stacks and crashed else ""),
        time_ns=int(extra.get("time_ns", 0)),
        lost_peer=bool(extra.get("lost_peer", False)),
        node=stacks.host if stacks else "",
        pid=stacks.pid if stacks else 0,
        doing=stacks.doing() if stacks and not crashed else "",
        world_size=stacks.world_size if stacks else int(extra.get("world_size", 0)),
    )


def first_failure(failures: Sequence[Failure]) -> Failure:
    """The cause among several failures: the earliest that is not merely a consequence.

    A rank that lost its peer, or was asked to end, comes last. One that was killed wrote no time;
    it comes before those that then lost it.
    """

    def order(failure: Failure) -> tuple[bool, int, int]:
        return failure.consequence, failure.time_ns, failure.rank

    return min(failures, key=order)


def report(
    failures: Sequence[Failure],
    world_size: int,
    done: Collection[int] = (),
    meanwhile: Mapping[int, str] = MappingProxyType({}),
    *,
    oom_kills: int = 0,
) -> RankFailed:
    """One report of all failures: the cause with its traceback, the others in one line.

    Args:
        failures: at least one.
        world_size: ranks in all.
        done: ranks that had ended well, or were about to; others may have waited for them in vain.
        meanwhile: by rank, what each of the others was doing when it was ended.
        oom_kills: processes that the kernel has ended since the run began, for want of memory.
    """
    cause = first_failure(failures).cause()
    # Which of those that failed alike was a moment earlier tells nothing.
    first = min((f for f in failures if f.cause() == cause), key=lambda f: f.rank)
    left = sorted(set(done) - {f.rank for f in failures}) if first.lost_peer else []
    if left:
        headline = (
            f"rank {first.rank} of {world_size} lost rank {_ranks(left)}, which was done, without "
            "an error; every rank has to take part in every collective operation"
        )
    elif first.lost_peer:
        headline = f"rank {first.rank} of {world_size} lost another: {_SOURCE.sub('', cause)}"
    else:
        headline = f"rank {first.rank} of {world_size} failed: {cause}"
    lines = [headline]
    if first.node:
        number = f", process {first.pid}" if first.pid else ""
        status = f", with exit status {first.exitcode}" if first.message else ""
        lines.append(f"on {first.node}{number}{status}")
    if first.exitcode == -signal.SIGKILL and oom_kills:
        lines.append(
            "memory ran out: the kernel has ended a process of this computer since the run began "
            "(dmesg names it); ask for smaller batches, fewer processes or more memory"
        )
    others = [f for f in failures if f is not first]
    same = [f.rank for f in others if f.cause() == cause]
    if same:
        lines.append(f"and so did rank {_ranks(same)}")
    lost = [f for f in others if f.lost_peer and f.cause() != cause]
    told = [f for f in others if f not in lost and f.cause() != cause and not f.doing]
    after = [f"rank {f.rank}: {_brief(f.cause())}" for f in told]
    if lost:
        after.append(
            f"rank {_ranks([f.rank for f in lost])} lost another: {_brief(lost[0].cause())}"
        )
    if after:
        lines.append(f"after it: {'; '.join(after)}")
    told_of = {first.rank, *same, *(f.rank for f in (*lost, *told))}
    doing = {f.rank: f.doing for f in others} | dict(meanwhile)
    doing = {rank: what for rank, what in doing.items() if what and rank not in told_of}
    if doing:
        lines.append(f"meanwhile: {'; '.join(_together(doing))}")
    # Without a place it says no more than the message.
    if "Traceback" in first.trace or 'File "' in first.trace:
        lines += ["", first.trace.rstrip()]
    return RankFailed("\n".join(lines), rank=first.rank, exit_status=first.exit_status or 1)


def _together(doing: Mapping[int, str]) -> list[str]:
    """Ranks that did the same in one."""
    ranks: dict[str, list[int]] = {}
    for rank, what in sorted(doing.items()):
        ranks.setdefault(what, []).append(rank)
    return [f"rank {_ranks(who)} at {what}" for what, who in ranks.items()]


def _ranks(numbers: Sequence[int]) -> str:
    return listed([str(number) for number in numbers], 16)


def _brief(text: str) -> str:
    line = text.splitlines()[0] if text else ""
    line = _SOURCE.sub("", line)
    return line if len(line) <= 100 else line[:97] + "..."
