"""NVIDIA GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchweft.api import Accelerator, RankInfo
from torchweft.errors import NotAvailable

__all__ = ["CUDA"]


class CUDA(Accelerator):
    """One GPU per process."""

    backend = "nccl"

    def bind(self, rank: RankInfo, devices: Sequence[int]) -> torch.device:
        """The GPU of this local rank, made current. Raises ``NotAvailable``."""
        if not torch.cuda.is_available():
            raise NotAvailable(
                f"accelerator 'cuda' was chosen, but torch {torch.__version__} cannot use a GPU "
                "in this process; compare torch.version.cuda with the driver (nvidia-smi)"
            )
        device = torch.device("cuda", devices[rank.local_rank % len(devices)])
        torch.cuda.set_device(device)
        return device

    def fork_hazard(self) -> str | None:
        """An open device file: even ``torch.cuda.is_available()`` alone spoils a fork."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return "CUDA was initialised before the fork"
        folder = Path("/proc/self/fd")
        for entry in folder.iterdir() if folder.is_dir() else ():
            try:
                target = os.readlink(entry)
            except OSError:  # it was closed meanwhile
                continue
            if target.startswith("/dev/nvidia"):
                return f"CUDA holds {target} open, which a forked process cannot use"
        return None

    def rng_state(self) -> Any:
        """A byte tensor on the CPU."""
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: Any) -> None:
        """Restore it."""
        torch.cuda.set_rng_state(state)

    def flight_records(self, *, operations: bool) -> list[str]:
        """Of nccl too, where this torch has it."""
        records = super().flight_records(operations=operations)
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if dump is not None:
            records.append(bytes(dump(operations, False)).decode("utf-8", "replace"))
        return records

    def memory(self) -> dict[str, int]:
        """Bytes that ``torch.cuda``'s functions of these names, after ``memory_``, count."""
        return {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "max_allocated": torch.cuda.max_memory_allocated(),
        }

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize()
