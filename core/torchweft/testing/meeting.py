"""The least that a strategy can be, for tests of what is not a strategy."""

from __future__ import annotations

from typing import Any

from torchweft.api import (
    Collectives,
    DataShard,
    Group,
    Place,
    ProcessGroup,
    Strategy,
    join_group,
    leave_group,
)

__all__ = ["Meeting"]


class Meeting(Strategy):
    """One process per device; they can talk to each other and do nothing else together."""

    name = "meeting"
    group: Group

    def start(self, place: Place) -> None:
        """Join a group over the accelerator's backend."""
        super().start(place)
        self.group = join_group(place, backend=place.accelerator.backend)

    def stop(self, failed: bool) -> None:
        """Leave it."""
        leave_group(self.group, failed=failed)

    @property
    def shard(self) -> DataShard:
        """Every process is a replica."""
        return DataShard(replicas=self.place.rank.world_size, first=self.place.rank.rank)

    @property
    def collectives(self) -> Collectives:
        """Over the group."""
        return ProcessGroup(self.place.device)

    def __reduce__(self) -> tuple[Any, ...]:
        # Ranks in fresh processes make their own.
        return Meeting, ()
