"""Who this process is."""

from __future__ import annotations

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
        run_id: the same in every process of one run, different in every other run.
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
        """Read the variables that torchrun sets (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, …)."""
        local_rank = _number(environ, "LOCAL_RANK")
        local_world_size = _number(environ, "LOCAL_WORLD_SIZE", local_rank + 1)
        return cls(
            rank=_number(environ, "RANK"),
            world_size=_number(environ, "WORLD_SIZE"),
            local_rank=local_rank,
            local_world_size=local_world_size,
            node_rank=_number(environ, "GROUP_RANK", _number(environ, "NODE_RANK", 0)),
            run_id=environ.get("TORCHELASTIC_RUN_ID", ""),
            restart=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        )

    def to_environ(self) -> dict[str, str]:
        """The same variables, for a rank that is about to run user code."""
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


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        found = "is not set" if text is None else f"is '{text}'"
        raise InvalidRequest(
            f"this process was started as a rank of a distributed run, but the environment "
            f"variable {name} {found}; it takes a number"
        ) from None
