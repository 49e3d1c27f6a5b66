"""Sharding of map-style data: every replica gets its part of what a loader would draw alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from torchweft.api import DataShard
from torchweft.data.epoch import HearsEpoch, tell_epoch
from torchweft.data.stream import same_stream
from torchweft.errors import InvalidRequest

__all__ = ["ReplicaSampler", "ShardedSampler", "StackedBatches", "shard_samplers"]


class ReplicaSampler(HearsEpoch, DistributedSampler[Any]):
    """torch's ``DistributedSampler``, whose user is heard when he sets the epoch."""


class ShardedSampler(HearsEpoch, Sampler[Any]):
    """Deals what another sampler draws, indices or whole batches, to the replicas in turn.

    Every process draws the other sampler in full, from the same random stream (``same_stream``),
    which is another one in each epoch, and keeps the items of the replicas that it feeds: replica
    ``r`` of ``n`` gets items ``r``, ``r + n``, ``r + 2n``, … as torch's ``DistributedSampler``
    gives them. So that all replicas get equally many, items from the start are repeated, or those
    at the end are left out under ``drop_last``.

    The order depends on ``seed`` and epoch alone, not on the state of a generator that the user
    gave to the sampler.

    Attributes:
        sampler: the sampler that is dealt from; its length must be known.
        shard: the replicas that this process feeds.
        epoch: which epoch is drawn next.
    """

    def __init__(self, sampler: Any, shard: DataShard, *, seed: int, drop_last: bool) -> None:
        self.sampler = sampler
        self.shard = shard
        self.seed = seed
        self.drop_last = drop_last

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn next, here and in the sampler that is dealt from."""
        super().set_epoch(epoch)
        tell_epoch(self.sampler, epoch)

    def parts(self) -> list[list[Any]]:
        """What each replica of this process gets in this epoch: ``count`` lists, equally long."""
        with same_stream(self.seed + self.epoch, self.sampler):
            items = list(self.sampler)
        replicas = self.shard.replicas
        missing = -len(items) % replicas
        if missing and self.drop_last:
            del items[len(items) - len(items) % replicas :]
        elif missing and items:
            # Fewer items than replicas: they go round more than once.
            items += (items * -(-missing // len(items)))[:missing]
        first = self.shard.first
        return [items[first + offset :: replicas] for offset in range(self.shard.count)]

    def __iter__(self) -> Iterator[Any]:
        parts = self.parts()
        if len(parts) == 1:
            return iter(parts[0])
        return (item for round_ in zip(*parts, strict=True) for item in round_)

    def __len__(self) -> int:
        drawn = len(self.sampler)
        replicas = self.shard.replicas
        each = drawn // replicas if self.drop_last else -(-drawn // replicas)
        return each * self.shard.count


class StackedBatches(Sampler[list[Any]]):
    """The batches of all replicas that a process feeds, put together to one batch per step.

    Attributes:
        sampler: deals the replicas' parts.
        batch_size: of one replica; None where the parts are made of batches already.
        drop_last: whether a smaller batch at the end is left out.
    """

    def __init__(self, sampler: ShardedSampler, batch_size: int | None, drop_last: bool) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[list[Any]]:
        streams: list[Any] = self.sampler.parts()
        if self.batch_size is not None:
            streams = [BatchSampler(part, self.batch_size, self.drop_last) for part in streams]
        for batches in zip(*streams, strict=True):
            yield [index for batch in batches for index in batch]

    def __len__(self) -> int:
        each = len(self.sampler) // self.sampler.shard.count
        if self.batch_size is None:
            return each
        return each // self.batch_size if self.drop_last else -(-each // self.batch_size)


def shard_samplers(loader: DataLoader[Any], shard: DataShard, seed: int) -> tuple[Any, Any]:
    """What takes the place of ``loader.sampler`` and ``loader.batch_sampler``.

    Sequential and shuffled loaders get torch's ``DistributedSampler``, with the loader's
    ``drop_last``; any other sampler that has a length is dealt by ``ShardedSampler``, and so is a
    batch sampler of the user's own, by whole batches. A distributed sampler that fits the shard
    is kept. With one replica everything is kept. Where a process feeds several replicas, the
    batch sampler's batches are theirs put together.

    Raises:
        InvalidRequest: a distributed sampler for other replicas, a sampler without a length, or
            ``batch_size=None`` where batches of several replicas must be put together.
    """
    sampler: Any = loader.sampler
    batch_sampler: Any = loader.batch_sampler
    if batch_sampler is None:
        if type(sampler) is BatchSampler:
            # A dataset that takes a list of indices: its batch sampler stands at this place.
            return _shard_batches(sampler, shard, seed), None
        if _fits(sampler, shard) or shard.replicas == 1:
            return sampler, None
        if shard.count > 1:
            raise InvalidRequest(
                f"this process feeds {shard.count} replicas, but a loader with batch_size=None "
                "has no batches of indices that could be put together for them; give it a "
                "batch_size, a batch_sampler, or sampler=BatchSampler(...)"
            )
        return _shard_indices(sampler, shard, seed, drop_last=False), None
    if type(batch_sampler) is BatchSampler:
        new = _shard_batches(batch_sampler, shard, seed)
        return (sampler if new is batch_sampler else new.sampler), new
    if _fits(batch_sampler, shard) or shard.replicas == 1:
        return sampler, batch_sampler
    _check_length(batch_sampler, shard)
    dealt = ShardedSampler(
        batch_sampler, shard, seed=seed, drop_last=bool(getattr(batch_sampler, "drop_last", False))
    )
    return sampler, dealt if shard.count == 1 else StackedBatches(dealt, None, False)


def _shard_batches(batch_sampler: BatchSampler, shard: DataShard, seed: int) -> Any:
    sampler = batch_sampler.sampler
    if _fits(sampler, shard) or shard.replicas == 1:
        return batch_sampler
    size, drop_last = batch_sampler.batch_size, batch_sampler.drop_last
    sharded = _shard_indices(sampler, shard, seed, drop_last)
    if shard.count == 1:
        return BatchSampler(sharded, size, drop_last)
    return StackedBatches(sharded, size, drop_last)


def _shard_indices(sampler: Any, shard: DataShard, seed: int, drop_last: bool) -> Any:
    """A ``ShardedSampler``, or torch's own where it gives the same."""
    _check_length(sampler, shard)
    shuffle = _plain_shuffle(sampler)
    if shuffle is None:
        return ShardedSampler(sampler, shard, seed=seed, drop_last=drop_last)
    data = sampler.data_source
    if shard.count == 1:
        return ReplicaSampler(
            data, shard.replicas, shard.first, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
    # Drawn once, not once per replica.
    order = ReplicaSampler(data, 1, 0, shuffle=shuffle, seed=seed)
    return ShardedSampler(order, shard, seed=seed, drop_last=drop_last)


def _plain_shuffle(sampler: Any) -> bool | None:
    """Whether each index comes once, shuffled or in order; None where neither is certain."""
    # Not isinstance: a subclass may draw something else.
    if type(sampler) is SequentialSampler:
        return False
    if type(sampler) is RandomSampler and not sampler.replacement:
        return True if sampler.num_samples == len(sampler.data_source) else None
    return None


def _fits(sampler: Any, shard: DataShard) -> bool:
    """Whether the sampler is a distributed one already, for just what this process feeds."""
    # Those that libraries bring seldom are subclasses of torch's, but carry its two numbers; and
    # a batch sampler may be distributed by the sampler inside it.
    for held in (sampler, getattr(sampler, "sampler", None)):
        replicas, rank = getattr(held, "num_replicas", None), getattr(held, "rank", None)
        if not isinstance(replicas, int) or not isinstance(rank, int):
            continue
        if (replicas, rank, 1) == (shard.replicas, shard.first, shard.count):
            return True
        fed = f"replica {shard.first}"
        if shard.count > 1:
            fed = f"replicas {shard.first} to {shard.first + shard.count - 1}"
        raise InvalidRequest(
            f"the loader's {type(held).__name__} is for rank {rank} of {replicas}, but this "
            f"process feeds {fed} of {shard.replicas}; leave that sampler out (shuffle=True is "
            "enough, setup_dataloaders() shards the data), or keep it as it is with "
            "use_distributed_sampler=False"
        )
    return False


def _check_length(sampler: Any, shard: DataShard) -> None:
    try:
        len(sampler)
    except (TypeError, NotImplementedError) as error:
        raise InvalidRequest(
            f"the loader's sampler {type(sampler).__name__} has no length, so what it draws "
            f"cannot be dealt to {shard.replicas} replicas in equal parts; give it a __len__, or "
            "shard the data yourself and pass use_distributed_sampler=False"
        ) from error
