"""Processes that ``torch_xla.launch`` makes, one for each device of a host."""

from __future__ import annotations

import os
import pickle
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torchweft.api import Launcher, RankInfo, Rendezvous, RunPlan, map_leaves
from torchweft.errors import Misuse, RankFailed
from torchweft_xla.detect import MARK

__all__ = ["XLALaunch"]


class XLALaunch(Launcher):
    """``fabric.launch(function)`` through ``torch_xla.launch``.

    The function and its arguments are pickled, as for ``spawn``. On several hosts the script runs
    on each, and ``MASTER_ADDR`` and ``MASTER_PORT`` name the first.
    """

    owns_ranks = False

    def launch(
        self,
        plan: RunPlan,
        function: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        *,
        fork_hazard: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """Call the function in every process; returns what that of rank 0 returned."""
        if function is None:
            raise Misuse("launcher 'xla_launch' takes a function: fabric.launch(function)")
        if MARK in os.environ:
            return function(*arguments)
        used = fork_hazard()
        if used:
            raise Misuse(
                f"launcher 'xla_launch' makes fresh processes, and {used}: no other process can "
                "have that device; make tensors below fabric.launch(function)"
            )
        from torchweft_xla.library import torch_xla

        with tempfile.TemporaryDirectory(prefix="torchweft-xla-") as folder:
            path = Path(folder) / "result"
            run = uuid.uuid4().hex[:16]
            try:
                torch_xla.launch(_rank, args=(run, function, arguments, str(path)))
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                raise RankFailed(f"a process of 'torch_xla.launch' failed: {cause}") from error
            return pickle.loads(path.read_bytes()) if path.exists() else None

    def rendezvous(self, rank: RankInfo, environ: Mapping[str, str]) -> Rendezvous:
        """A store of rank 0: in its own process, or where the first host was said to be."""
        prefix = f"torchweft/{rank.run_id}/0"
        if rank.world_size == 1:
            return Rendezvous(hosts=True, prefix=prefix)
        if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
            raise Misuse(
                "launcher 'xla_launch' with several processes needs MASTER_ADDR and MASTER_PORT, "
                "an address and a free port of the first host, in the environment of all of them"
            )
        return Rendezvous(
            address=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
            hosts=rank.rank == 0,
            prefix=prefix,
        )

    def is_rank(self, environ: Mapping[str, str], name: str) -> bool:
        """Whether this process was made by it."""
        return MARK in environ


def _rank(
    index: int, run: str, function: Callable[..., Any], arguments: tuple[Any, ...], path: str
) -> None:
    """In a process of ``torch_xla.launch``."""
    from torchweft_xla.library import runtime

    rank = RankInfo(
        rank=runtime.global_ordinal(),
        world_size=runtime.world_size(),
        local_rank=runtime.local_ordinal(),
        local_world_size=runtime.local_process_count() * runtime.addressable_device_count(),
        node_rank=runtime.host_index(),
        run_id=run,
    )
    os.environ.update({**rank.to_environ(), MARK: run})
    result = function(*arguments)
    if rank.rank == 0:
        Path(path).write_bytes(pickle.dumps(map_leaves(result, _to_host)))


def _to_host(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf
