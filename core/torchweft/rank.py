"""Who this process is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torchweft.errors import InvalidRequest

__all__ = ["RankInfo", "Rendezvous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """The place of one process in a run.

    Attributes:
        rank: global rank, from 0 to ``world_size - 1``.
        world_size: processes in the whole run.
        local_rank: rank among the processes of this node.
        local_world_size: processes on this node.
        node_rank: rank of this node.
        run_id: the same in every process of one run, different in every other run; empty where
            nobody made one up.
        restart: how many times the run was restarted before this process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    run_id: str = ""
    restart: int = 0

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> RankInfo:
        """Read the variables that torchrun sets (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, …).

        Raises ``InvalidRequest`` for one that is missing, is not a number, or contradicts another.
        """
        rank, world_size = _place(environ, "RANK", "WORLD_SIZE")
        local_rank, local_world_size = _place(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if local_world_size > world_size:
            raise InvalidRequest(
                f"the environment variable LOCAL_WORLD_SIZE is {local_world_size}, which is more "
                f"than WORLD_SIZE, {world_size}; {_WAY_OUT}"
            )
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            node_rank=_number(environ, "GROUP_RANK" if "GROUP_RANK" in environ else "NODE_RANK", 0),
            run_id=environ.get("TORCHELASTIC_RUN_ID", ""),
            restart=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        )

    def to_environ(self) -> dict[str, str]:
        """The same variables, for a rank that is about to run user code.

        ``from_environ`` reads an equal ``RankInfo`` from them.
        """
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node_rank),
            "NODE_RANK": str(self.node_rank),
            "TORCHELASTIC_RUN_ID": self.run_id,
            "TORCHELASTIC_RESTART_COUNT": str(self.restart),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of one run meet.

    Attributes:
        address: host of the store.
        port: its TCP port.
        listen_fd: a listening socket for the process that hosts the store, so that the port is
            never raced for and is bound to the address that was meant.
        hosts: whether this process serves the store; otherwise somebody else does.
        prefix: set before every key; unique to run and restart, so that a restarted run never
            reads what dead ranks left.
        timeout: seconds that a collective or a look-up in the store may take.
    """

    address: str = "127.0.0.1"
    port: int = 0
    listen_fd: int | None = None
    hosts: bool = False
    prefix: str = ""
    timeout: float = 1800.0

    @property
    def loopback(self) -> bool:
        """Whether the run cannot leave this node."""
        return self.address in ("localhost", "::1") or self.address.startswith("127.")


_WAY_OUT = (
    "unset the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, …) "
    "if this process is no rank of such a run"
)


def _place(environ: Mapping[str, str], name: str, of: str) -> tuple[int, int]:
    """A rank and the number of ranks, which has to be larger."""
    rank, size = _number(environ, name), _number(environ, of)
    if rank >= size:
        raise InvalidRequest(
            f"the environment variable {name} is {rank}, and {of} is {size}; ranks count from 0, "
            f"so that {name} is less than {of}; {_WAY_OUT}"
        )
    return rank, size


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]+", text):
        found = "is not set" if text is None else f"is '{text}'"
        raise InvalidRequest(
            f"this process was started as a rank of a distributed run, but the environment "
            f"variable {name} {found}; it takes a number from 0; {_WAY_OUT}"
        )
    return int(text)
