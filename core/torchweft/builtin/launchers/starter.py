"""A command outside that makes ranks, and what it tells each of them. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torchweft.errors import InvalidRequest
from torchweft.handoff import Handoff
from torchweft.rank import RankInfo
from torchweft.specs import Detection

__all__ = ["Starter", "another_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Starter:
    """Who makes the ranks, and the variables in which it tells each where it is.

    Attributes:
        name: the command, as users know it.
        rank: variable of the rank among all.
        world_size: variable of the number of ranks.
        local_rank: variable of the rank among those of its node.
        local_world_size: variable of their number.
        nodes: variable of the number of nodes; empty where there is none.
        processes_hint: how to have ``{wanted}`` processes on each node, as ``Detection`` takes it.
        nodes_hint: how to have ``{wanted}`` nodes.
        in_blocks: how to write that as many ranks go to each node, one node after the other.
        set_address: how to set ``MASTER_ADDR`` for all ranks.
        set_port: how to set ``MASTER_PORT`` for all ranks.
    """

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    nodes: str = ""
    processes_hint: str
    nodes_hint: str
    in_blocks: str
    set_address: str
    set_port: str

    def made(self, environ: Mapping[str, str]) -> bool:
        """Whether it left something in the environment of this process."""
        return self.rank in environ or self.local_rank in environ

    def detection(self, environ: Mapping[str, str]) -> Detection:
        """What it made. Raises ``InvalidRequest`` where its variables contradict each other."""
        place = self.place(environ)
        return Detection(
            reason=f"{self.name} started this process",
            world_size=place.world_size,
            processes_per_node=place.local_world_size,
            processes_hint=self.processes_hint,
            nodes_hint=self.nodes_hint,
        )

    def counts_like(self, rank: str, world_size: str, environ: Mapping[str, str]) -> bool:
        """Whether two variables of somebody else say the same, who made this process then."""
        mine = (environ.get(self.rank), environ.get(self.world_size))
        return None not in mine and mine == (environ.get(rank), environ.get(world_size))

    def place(self, environ: Mapping[str, str]) -> RankInfo:
        """Which rank this is, and of which node.

        The nodes are counted by the ranks, which takes as many ranks on each, one node after the
        other. Wherever they lie otherwise some rank notices, and its error ends all of them.
        Raises ``InvalidRequest``.
        """
        rank, size = self._pair(environ, self.rank, self.world_size)
        local_rank, local_size = self._pair(environ, self.local_rank, self.local_world_size)
        nodes = self._number(environ, self.nodes) if self.nodes in environ else None
        uneven = size % local_size != 0 or (nodes is not None and nodes * local_size != size)
        if uneven or rank % local_size != local_rank:
            raise InvalidRequest(
                f"{self.name} started rank {rank} of {size} as number {local_rank} of "
                f"{local_size} on its node; torchweft takes as many ranks on every node, one "
                f"node after the other: {self.in_blocks}"
            )
        return RankInfo(
            rank=rank,
            world_size=size,
            local_rank=local_rank,
            local_world_size=local_size,
            node_rank=rank // local_size,
        )

    def _pair(self, environ: Mapping[str, str], name: str, of: str) -> tuple[int, int]:
        rank, size = self._number(environ, name), self._number(environ, of)
        if rank >= size:
            raise InvalidRequest(
                f"{self.name} started this process, but the environment variable {name} is "
                f"{rank}, and {of} is {size}; ranks count from 0, so that {name} is less than "
                f"{of}; {self._way_out()}"
            )
        return rank, size

    def _number(self, environ: Mapping[str, str], name: str) -> int:
        text = environ.get(name)
        if text is None or not re.fullmatch(r"[0-9]+", text):
            found = "is not set" if text is None else f"is '{text}'"
            raise InvalidRequest(
                f"{self.name} started this process, but the environment variable {name} {found}; "
                f"it takes a number from 0; set it for every rank, or {self._way_out()}"
            )
        return int(text)

    def _way_out(self) -> str:
        names = (self.rank, self.world_size, self.local_rank, self.local_world_size)
        return f"unset {', '.join(names)} if this process is no rank of such a run"


def another_run(environ: Mapping[str, str]) -> bool:
    """Whether torchweft made this process a rank itself, or a rank started it.

    What a starter left in the environment was then meant for a process further out.
    """
    handoff = Handoff.read(environ)
    return Handoff.stale(environ) or (handoff is not None and bool(handoff.launcher))
