"""Looks for a collective operation that takes too long, and says who did not come to it.

Torch's flight recorder, which its backends keep anyway, knows the operations of this rank by their
number in their group. Once one is overdue anywhere, every rank tells the others through the run's
store how far it has come.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from torchweft import process
from torchweft.api import Accelerator, RankInfo, Rendezvous, open_store
from torchweft.errors import CollectiveTimeout, listed

__all__ = ["Watchdog", "explain"]

#: Seconds that the others have to tell how far they have come.
_PATIENCE = 2.0
_OVERDUE = "overdue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watchdog:
    """A thread of a rank, from its start to the end of the process.

    Attributes:
        timeout: seconds that an operation may take.
        folder: where every rank's stacks are written once one took longer.
        rank: of this process.
        rendezvous: where the run's store is; it is served already.
        accelerator: whose flight records count.
    """

    timeout: float
    folder: Path
    rank: RankInfo
    rendezvous: Rendezvous
    accelerator: Accelerator

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store went, and with it the run
            prefix = f"{self.rendezvous.prefix}/watchdog"
            joined = replace(self.rendezvous, hosts=False, listen_fd=None, prefix=prefix)
            store = open_store(joined, self.rank)
            tick = min(max(self.timeout / 10, 0.05), 1.0)
            progress = _Progress()
            overdue: dict[str, Any] | None = None
            while overdue is None and not store.check([_OVERDUE]):
                time.sleep(tick)
                # All operations are looked at only where a group has not come on for long.
                if progress.rests(self._records("pg_status")) > self.timeout:
                    overdue = self._overdue()
            first = overdue is not None and store.add(_OVERDUE, 1) == 1
            # Nobody else ends the run: whatever fails from here on, it has to end.
            with contextlib.suppress(RuntimeError):
                store.set(f"at/{self.rank.rank}", json.dumps(self._state()))
            if first and overdue is not None:
                self._give_up(overdue, self._states(store))

    def _records(self, part: str) -> list[Any]:
        texts = self.accelerator.flight_records(operations=part == "entries")
        return [json.loads(text).get(part) for text in texts]

    def _operations(self) -> list[dict[str, Any]]:
        return [record for records in self._records("entries") for record in records or ()]

    def _overdue(self) -> dict[str, Any] | None:
        """The oldest operation that takes too long."""
        before = time.time_ns() - self.timeout * 1e9
        late = [r for r in self._operations() if not r["retired"] and r["time_created_ns"] < before]
        return min(late, key=lambda record: record["time_created_ns"], default=None)

    def _state(self) -> dict[str, Any]:
        """How far this rank has come: its last operation in every group, and where it is."""
        last: dict[str, Any] = {}
        for record in self._operations():
            group = record["process_group"][0]
            if group not in last or record["record_id"] > last[group]["record_id"]:
                last[group] = record
        at, unwritten = self._stacks()
        kept = {group: _kept(record) for group, record in last.items()}
        return {"last": kept, "at": at, "unwritten": unwritten}

    def _stacks(self) -> tuple[str, str]:
        """Write them; returns where the main thread is, and why they could not be written."""
        text, unwritten = "", ""
        try:
            with tempfile.TemporaryFile() as file:
                faulthandler.dump_traceback(file=file)
                file.seek(0)
                text = file.read().decode(errors="replace")
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"stacks-rank-{self.rank.rank}.txt").write_text(text)
        except OSError as error:
            unwritten = error.strerror or str(error)
        stacks = process.Stacks(
            rank=self.rank.rank, host=socket.gethostname(), pid=os.getpid(), text=text
        )
        return stacks.doing(), unwritten

    def _states(self, store: Any) -> dict[int, dict[str, Any]]:
        """Of all ranks that answer."""
        deadline = time.monotonic() + _PATIENCE
        states: dict[int, dict[str, Any]] = {}
        missing = set(range(self.rank.world_size))
        with contextlib.suppress(RuntimeError):  # the store goes with whoever serves it
            while missing and time.monotonic() < deadline:
                for rank in sorted(missing):
                    if store.check([f"at/{rank}"]):
                        states[rank] = json.loads(store.get(f"at/{rank}"))
                missing -= states.keys()
                time.sleep(0.02)
        return states

    def _give_up(self, overdue: dict[str, Any], states: dict[int, dict[str, Any]]) -> NoReturn:
        members = _members(overdue, self.rank.world_size)
        told = explain(_kept(overdue), members, states)
        unwritten = {state["unwritten"] for state in states.values()} - {""}
        where = f"every rank's stacks are in {self.folder}"
        if unwritten:
            where = f"stacks could not be written to {self.folder}: {', '.join(sorted(unwritten))}"
        process.record_failure(
            CollectiveTimeout(
                f"{_name(overdue, members)} took longer than {self.timeout:g} s (--timeout): "
                f"{told}; {where}"
            )
        )
        process.flush_streams()
        os._exit(1)


@dataclass(slots=True)
class _Progress:
    """How long ago groups of processes have last come on."""

    completed: dict[tuple[int, str], Any] = field(default_factory=dict)
    since: dict[tuple[int, str], float] = field(default_factory=dict)

    def rests(self, recorders: Sequence[Mapping[str, Mapping[str, Any]] | None]) -> float:
        """Seconds for which the slowest one has waited for an operation that was begun."""
        now = time.monotonic()
        longest = 0.0
        for number, groups in enumerate(recorders):
            for name, status in (groups or {}).items():
                group = number, name
                completed = status["last_completed_collective"]
                waits = status["last_enqueued_collective"] != completed
                if not waits or self.completed.get(group) != completed:
                    self.since[group] = now
                self.completed[group] = completed
                longest = max(longest, now - self.since[group])
        return longest


def explain(
    operation: Mapping[str, Any], members: Sequence[int], states: Mapping[int, Mapping[str, Any]]
) -> str:
    """Who has come to an operation, and who has not.

    Args:
        operation: ``group``, ``number``, ``name`` and ``what`` of it.
        members: ranks of its group.
        states: by rank, its ``last`` operation by group, and where it is ``at``.
    """
    group, number = operation["group"], operation["number"]
    last = {rank: states[rank]["last"].get(group) for rank in members if rank in states}
    arrived = [rank for rank in last if (last[rank] or {"number": -1})["number"] >= number]
    missing = [rank for rank in last if rank not in arrived]
    gone = [rank for rank in members if rank not in states]
    parts = [f"rank {_ranks(arrived)} came to it"]
    for rank in missing[:8]:
        before = last[rank]
        done = f"after {before['name']} {before['number']}" if before else "in none of its group"
        parts.append(f"rank {rank} did not: it is at {states[rank]['at']}, {done}")
    if missing[8:]:
        parts.append(f"nor did rank {_ranks(missing[8:])}")
    if gone:
        parts.append(f"rank {_ranks(gone)} has ended or does not answer")
    unlike = {
        rank: last[rank]["what"]
        for rank in arrived
        if last[rank]["number"] == number and last[rank]["what"] != operation["what"]
    }
    if unlike:
        rank, what = next(iter(unlike.items()))
        parts.append(f"but rank {_ranks([*unlike])} with another one: {what} (rank {rank})")
    return "; ".join(parts)


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the others need to know of an operation."""
    sizes = "+".join("x".join(map(str, size)) or "1" for size in record["input_sizes"])
    types = sorted(set(record["input_dtypes"]))
    name = record["profiling_name"].rpartition(":")[2]
    return {
        "group": record["process_group"][0],
        "number": record["collective_seq_id"],
        "name": name,
        "what": f"{name} of {sizes or 'nothing'} {'+'.join(types)}".rstrip(),
    }


def _name(record: Mapping[str, Any], members: Sequence[int]) -> str:
    kept = _kept(record)
    described = record["process_group"][1]
    if described == "default_pg":
        where = ""
    elif described in ("", "undefined"):  # torch says so of one that was made without a name
        where = f" in the group of rank {_ranks(members)}"
    else:
        where = f" in group '{described}'"
    return f"{kept['what']}, operation {kept['number']}{where},"


def _members(record: Mapping[str, Any], world_size: int) -> list[int]:
    """Ranks of an operation's group; all where torch does not tell."""
    with contextlib.suppress(Exception):
        groups = dist.distributed_c10d._world.pg_group_ranks
        for group, ranks in groups.items():
            # Groups that this rank is none of are there too, as a number.
            if getattr(group, "group_name", None) == record["process_group"][0]:
                return sorted(ranks)
    return list(range(world_size))


def _ranks(numbers: Sequence[int]) -> str:
    return listed([str(number) for number in numbers], 16)
