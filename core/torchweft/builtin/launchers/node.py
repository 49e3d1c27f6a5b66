"""What the launchers that make processes on this node share: a run's socket, folder and ranks."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchweft import process
from torchweft.handoff import Handoff
from torchweft.plan import RunPlan
from torchweft.rank import RankInfo

__all__ = ["Node"]


class Node:
    """One run on this node, as its supervisor sees it.

    Binds and listens on loopback before any rank exists, so that nothing is reachable from
    outside and no port is raced for; the store's thread starts after the last fork.
    """

    address = "127.0.0.1"

    def __init__(self, plan: RunPlan, launcher: str) -> None:
        self.size = plan.topology.processes_per_node
        self.launcher = launcher
        self.run_id = uuid.uuid4().hex[:16]
        self.supervisor = os.getpid()
        # What torchweft's command said stays true in the ranks.
        outer = Handoff.read(os.environ)
        self._flags = dict(outer.flags) if outer else {}
        self._dry_run = outer is not None and outer.dry_run
        self._folder = Path(tempfile.mkdtemp(prefix="torchweft-"))
        self._socket = socket.create_server((self.address, 0), backlog=max(128, 2 * self.size))
        self.port: int = self._socket.getsockname()[1]
        self._store: Any = None

    def info(self, local_rank: int) -> RankInfo:
        """The rank with that index on this node, which is the only one."""
        return RankInfo(
            rank=local_rank,
            world_size=self.size,
            local_rank=local_rank,
            local_world_size=self.size,
            run_id=self.run_id,
        )

    @property
    def folder(self) -> Path:
        """The run's own, on this node."""
        return self._folder

    @property
    def error_files(self) -> dict[int, Path]:
        """By rank, where it writes its error."""
        return {rank: self._folder / f"rank-{rank}.json" for rank in range(self.size)}

    def handoff(self, *, pid: int | None = None) -> Handoff:
        """What ranks are told: for the process ``pid``, or for all children of this one."""
        return Handoff(
            run_id=self.run_id,
            launcher=self.launcher,
            flags=self._flags,
            dry_run=self._dry_run,
            pid=pid,
            parent=None if pid is not None else self.supervisor,
        )

    def enter(self, local_rank: int) -> None:
        """Make the calling process, which was made for it, that rank."""
        process.become_rank(
            self.info(local_rank),
            address=self.address,
            port=self.port,
            handoff=self.handoff(pid=os.getpid()),
            error_file=str(self.error_files[local_rank]),
        )

    def leave_to_supervisor(self) -> None:
        """In a forked rank: close what belongs to the supervisor."""
        self._socket.close()

    def environ(self, local_rank: int) -> dict[str, str]:
        """The environment of that rank as a child process of this one."""
        return {
            **os.environ,
            **self.info(local_rank).to_environ(),
            **self.handoff().to_environ(),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            process.ERROR_FILE: str(self.error_files[local_rank]),
        }

    def serve(self) -> None:
        """Start the store on the socket. After the last fork: it runs a thread."""
        self._store = TCPStore(
            self.address,
            self.port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=self._socket.detach(),
        )

    def close(self) -> None:
        """Give back the port and the folder."""
        self._store = None
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
