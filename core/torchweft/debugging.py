"""Looking into a run: a debugger on one rank while the others wait, and memory by rank."""

from __future__ import annotations

import pdb
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from torchweft.api import Run

__all__ = ["HoldingPdb", "memory_by_rank"]


class HoldingPdb(pdb.Pdb):
    """Python's debugger, in which the other ranks are held until something is executed.

    Looking around keeps them; the first command that goes on (``next``, ``continue``, ``quit``, …)
    lets them go on too, because what is executed may be a collective operation.

    Args:
        release: lets the others go; called once.
    """

    def __init__(self, release: Callable[[], None], **options: Any) -> None:
        super().__init__(nosigint=True, **options)
        self.prompt = "(rank 0) "
        self._release: Callable[[], None] | None = release
        self._started = False

    def _let_go(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()

    def set_step(self) -> None:
        """Stop after one line."""
        # set_trace() itself steps to the line at which it stops first.
        if self._started:
            self._let_go()
        super().set_step()

    def set_next(self, frame: FrameType) -> None:
        """Stop at the next line of the frame."""
        self._let_go()
        super().set_next(frame)

    def set_return(self, frame: FrameType) -> None:
        """Stop when the frame returns."""
        self._let_go()
        super().set_return(frame)

    def set_until(self, frame: FrameType, lineno: int | None = None) -> None:
        """Stop at a line further down."""
        self._let_go()
        super().set_until(frame, lineno)

    def set_continue(self) -> None:
        """Go on."""
        self._let_go()
        super().set_continue()

    def set_quit(self) -> None:
        """End the program."""
        self._let_go()
        super().set_quit()

    def interaction(self, frame: FrameType | None, *args: Any, **kwargs: Any) -> None:
        """Talk to the user."""
        self._started = True
        super().interaction(frame, *args, **kwargs)


def memory_by_rank(run: Run) -> list[dict[str, int]]:
    """Bytes in use, one dictionary per rank, the same in every rank.

    ``"host"`` and ``"host_peak"`` are of the process (resident), the others what the accelerator
    counts, by its names.
    """
    mine = {**_host_memory(), **run.accelerator.memory()}
    names = sorted(mine)
    values = torch.tensor([mine[name] for name in names], dtype=torch.int64, device=run.device)
    rows = run.collectives.all_gather(values).tolist()
    return [dict(zip(names, row, strict=True)) for row in rows]


def _host_memory() -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if not status.exists():
        return {"host_peak": peak * (1 if sys.platform == "darwin" else 1024)}
    # A forked rank inherits its parent's peak in getrusage; Linux tells its own here.
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    kib = {"host": "VmRSS", "host_peak": "VmHWM"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in kib.items()}
