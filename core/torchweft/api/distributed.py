"""The base class of strategies whose processes meet in one process group."""

from __future__ import annotations

from datetime import timedelta

from torchweft.api.collectives import Collectives, ProcessGroup
from torchweft.api.group import join_group, leave_group
from torchweft.api.place import Place
from torchweft.api.strategy import DataShard, Strategy

__all__ = ["DistributedStrategy"]

#: Seconds for which a group waits longer than whoever watches over its operations.
_MARGIN = 60.0


class DistributedStrategy(Strategy):
    """A replica in every process, and all processes in torch.distributed's default group.

    What a strategy does with models and gradients is left to it.
    """

    #: Seconds that a collective may take before the run is given up.
    timeout: float = 1800.0

    def backend(self, place: Place) -> str:
        """The name of the group's backend, as ``init_process_group`` takes it."""
        return place.accelerator.backend

    def start(self, place: Place) -> None:
        """Join the process group."""
        super().start(place)
        limit = timedelta(seconds=max(self.timeout, place.timeout + _MARGIN))
        self._group = join_group(place, backend=self.backend(place), timeout=limit)
        self._collectives = ProcessGroup(place.device)

    def stop(self, failed: bool) -> None:
        """Leave the process group."""
        leave_group(self._group, failed=failed)

    @property
    def collectives(self) -> Collectives:
        """Over the default process group."""
        return self._collectives

    @property
    def shard(self) -> DataShard:
        """One replica per process."""
        rank = self.place.rank
        return DataShard(replicas=rank.world_size, first=rank.rank)
