"""The base class of accelerators: a kind of device and what a process does with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from torchweft.rank import RankInfo

__all__ = ["Accelerator"]


class Accelerator(ABC):
    """Gives a process its device.

    A complete accelerator, declared by
    ``AcceleratorSpec(name="npu", device="npu", target="my_package.npu:NPU",
    probe="my_package.probe:npu")``::

        class NPU(Accelerator):
            backend = "hccl"

            def bind(self, rank, devices):
                device = torch.device("npu", devices[rank.local_rank])
                torch.npu.set_device(device)
                return device

            def synchronize(self):
                torch.npu.synchronize()

    The constructor takes options and touches no device: an accelerator is constructed before
    processes are forked, and bound after.
    """

    #: Name of the ``torch.distributed`` backend for collectives between such devices.
    backend: str = "gloo"

    #: Whether batches from a ``DataLoader`` are already where this device computes.
    host_memory: bool = False

    @abstractmethod
    def bind(self, rank: RankInfo, devices: Sequence[int]) -> torch.device:
        """Make one of this node's ``devices`` current for this process and return it.

        Called once in every process, before any process group exists.
        """

    def fork_hazard(self) -> str | None:
        """Why a fork of this process would have a broken device, or None when it is safe."""
        return None

    def seed(self, seed: int) -> None:  # noqa: B027
        """Begin the device's random stream anew, where ``torch.manual_seed`` does not reach it.

        ``seed``: 0 to 2**32 - 1. Called in every process after ``bind``; what was seeded before
        is for ``bind`` to take from ``torch.initial_seed()``.
        """

    def rng_state(self) -> Any:
        """State of the device's random generator, as ``set_rng_state`` takes it; None: no own."""
        return None

    # These need overriding only where there is something to do.
    def set_rng_state(self, state: Any) -> None:  # noqa: B027
        """Restore what ``rng_state`` returned."""

    def memory(self) -> dict[str, int]:
        """Bytes in use on the bound device, by torch's names; empty where nothing is counted."""
        return {}

    def synchronize(self) -> None:  # noqa: B027
        """Wait until the device has done what was queued."""

    def flight_records(self, *, operations: bool) -> list[str]:
        """What torch's flight recorders know of this process's collective operations, as JSON.

        ``operations``: each of the last ones, rather than how far every group has come alone. Of
        gloo's here; an accelerator whose own backend has a recorder adds what that knows. Callable
        in any thread.
        """
        dump = getattr(torch._C, "_distributed_c10d", None)
        if dump is None:  # a torch without torch.distributed
            return []
        return [bytes(dump._dump_fr_trace_json(operations, False)).decode("utf-8", "replace")]
