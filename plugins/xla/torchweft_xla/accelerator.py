"""TPUs, and the processor through XLA's own client for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from torchweft.api import Accelerator, RankInfo
from torchweft.errors import Misuse, NotAvailable

__all__ = ["XLA"]


class XLA(Accelerator):
    """All devices of a host as one, or one of them.

    With several devices torch-xla is put into SPMD mode: they are a single ``torch.device``, and
    tensors lie on all of them, divided or copied.
    """

    # Processes are hosts, which talk to each other beside XLA.
    backend = "gloo"

    def bind(self, rank: RankInfo, devices: Sequence[int]) -> torch.device:
        """The one device of this process. Raises ``Misuse`` and ``NotAvailable``."""
        # A process of several on its host has one device for itself.
        several = rank.local_world_size == 1 and (len(devices) > 1 or rank.world_size > 1)
        used = _in_use()
        try:
            from torchweft_xla.library import runtime, torch_xla
        except ImportError as error:
            raise NotAvailable(
                f"accelerator 'xla' was chosen, but torch-xla cannot be imported: {error}; it "
                "needs the torch that it was made for: pip install torch==2.9.0 torch-xla==2.9.0, "
                "in an environment of its own"
            ) from error
        if several and not runtime.is_spmd():
            if used:
                raise Misuse(
                    "an XLA device was used before fabric.launch(), and how several of them are "
                    "driven has to be settled before the first is; make tensors on "
                    "fabric.device, below fabric.launch()"
                )
            runtime.use_spmd()
        if rank.local_world_size > 1:
            if not used and runtime.device_type() == "TPU":
                # What torch-xla does in the processes that it makes, and under torchrun.
                from torch_xla._internal import pjrt

                pjrt.initialize_multiprocess(rank.local_rank, rank.local_world_size)
            device: torch.device = torch_xla.device()
        else:
            device = torch_xla.device() if several else torch_xla.device(devices[0])
        # torch's seed does not reach XLA's generator: one that was set before is its first.
        self.seed(torch.initial_seed())
        return device

    def fork_hazard(self) -> str | None:
        """A client that runs: its threads are not in a fork."""
        return "an XLA device was used before the fork" if _in_use() else None

    def seed(self, seed: int) -> None:
        """Let XLA's generator begin with ``seed``."""
        from torchweft_xla.library import xm

        xm.set_rng_state(seed % 2**63)

    def rng_state(self) -> Any:
        """A whole number."""
        from torchweft_xla.library import xm

        return xm.get_rng_state()

    def set_rng_state(self, state: Any) -> None:
        """Restore it."""
        from torchweft_xla.library import xm

        xm.set_rng_state(int(state))

    def memory(self) -> dict[str, int]:
        """Bytes of one TPU device; empty for all devices as one, and for the processor."""
        from torchweft_xla.library import xm

        try:
            told = xm.get_memory_info()
        except RuntimeError:
            return {}
        names = {
            "allocated": "bytes_used",
            "reserved": "bytes_limit",
            "max_allocated": "peak_bytes_used",
        }
        return {name: int(told[own]) for name, own in names.items() if own in told}

    def synchronize(self) -> None:
        """Have the device do what is pending, and wait for it."""
        from torchweft_xla.library import torch_xla

        torch_xla.sync(wait=True)


def _in_use() -> bool:
    """Whether this process has a running client; asking does not start one."""
    library = sys.modules.get("torch_xla")
    return library is not None and bool(library._XLAC._xla_runtime_is_initialized())
