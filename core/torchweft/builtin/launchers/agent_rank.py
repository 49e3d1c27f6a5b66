"""What torch's agent runs in a forked rank: the script, as if it had been started by hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

from torchweft import process
from torchweft.handoff import Handoff

__all__ = ["Script", "Stdin", "work"]


class Stdin:
    """The command's standard input, on its way to a process that the fork server makes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: Any = descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptor": reduction.DupFd(self._descriptor)}

    def take(self, local_rank: int) -> None:
        """Make it this process's standard input, in local rank 0 alone."""
        descriptor: int = self._descriptor.detach()
        if local_rank == 0:
            os.dup2(descriptor, 0)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What every rank of a job runs."""

    path: str
    arguments: tuple[str, ...]
    run_id: str
    flags: Mapping[str, Any]
    stdin: Stdin | None


def work(script: Script) -> None:
    """Run the script in this rank. Returns when it ended well; otherwise the process ends."""
    process.die_with_parent(os.getppid())
    try:
        _enter(script)
    except BaseException as error:
        process.record_failure(error)
        os._exit(1)
    status = process.run_script(script.path, list(script.arguments))
    if status != 0:
        os._exit(status)
    # The agent waits for a rank that ended well to return, and ends it without any teardown.


def _enter(script: Script) -> None:
    if script.stdin is not None:
        script.stdin.take(int(os.environ["LOCAL_RANK"]))
    process.as_main_process()
    handoff = Handoff(
        run_id=script.run_id, launcher="torchrun", flags=script.flags, pid=os.getpid()
    )
    os.environ.update(handoff.to_environ())
    process.share_threads(int(os.environ["LOCAL_WORLD_SIZE"]))
