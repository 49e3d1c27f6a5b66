"""Sharding of map-style data: every replica gets its part of what a loader would draw alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, Literal

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

__all__ = [
    "DUPLICATES",
    "Duplicates",
    "MarkedBatches",
    "ReplicaSampler",
    "ShardedSampler",
    "StackedBatches",
    "no_batches_to_mark",
    "shard_samplers",
]

#: What becomes of the samples that are repeated so that all replicas get equally many.
Duplicates = Literal["keep", "drop", "mask"]
DUPLICATES = ("keep", "drop", "mask")


class ReplicaSampler(HearsEpoch, DistributedSampler[Any]):
    """torch's ``DistributedSampler``, whose user is heard when he sets the epoch."""


class ShardedSampler(HearsEpoch, Sampler[Any]):
    """Deals what another sampler draws, indices or whole batches, to the replicas in turn.

    Every process draws the other sampler in full, from the same random stream (``same_stream``),
    which is another one in each epoch, and keeps the items of the replicas that it feeds: replica
    ``r`` of ``n`` gets items ``r``, ``r + n``, ``r + 2n``, … as torch's ``DistributedSampler``
    gives them. So that all replicas get equally many, items from the start are repeated, or those
    at the end are left out under ``drop_last``; ``repeat=False`` does neither, and the first
    replicas may get one item more than the last ones.

    The order depends on ``seed`` and epoch alone, not on the state of a generator that the user
    gave to the sampler.

    Attributes:
        sampler: the sampler that is dealt from; its length must be known.
        shard: the replicas that this process feeds.
        epoch: which epoch is drawn next.
    """

    def __init__(
        self,
        sampler: Any,
        shard: DataShard,
        *,
        seed: int,
        drop_last: bool,
        repeat: bool = True,
    ) -> None:
        self.sampler = sampler
        self.shard = shard
        self.seed = seed
        self.drop_last = drop_last
        self.repeat = repeat

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn next, here and in the sampler that is dealt from."""
        super().set_epoch(epoch)
        tell_epoch(self.sampler, epoch)

    def parts(self) -> list[list[Any]]:
        """What each replica of this process gets in this epoch: ``count`` lists.

        They are equally long, except under ``repeat=False``.
        """
        return [part for part, _ in self.counted_parts()]

    def counted_parts(self) -> list[tuple[list[Any], int]]:
        """``parts()``, each with how many of its items were not repeated; those come first."""
        with same_stream(self.seed + self.epoch, self.sampler):
            items = list(self.sampler)
        replicas = self.shard.replicas
        drawn = len(items)
        if self.drop_last:
            del items[drawn - drawn % replicas :]
        elif items and self.repeat:
            missing = -drawn % replicas
            # Fewer items than replicas: they go round more than once.
            items += (items * -(-missing // drawn))[:missing]
        return [
            (items[replica::replicas], len(range(replica, min(drawn, len(items)), replicas)))
            for replica in range(self.shard.first, self.shard.first + self.shard.count)
        ]

    def lengths(self) -> list[int]:
        """The lengths of ``parts()``."""
        drawn, replicas = len(self.sampler), self.shard.replicas
        replica_range = range(self.shard.first, self.shard.first + self.shard.count)
        if self.drop_last:
            return [drawn // replicas for _ in replica_range]
        if self.repeat:
            return [-(-drawn // replicas) for _ in replica_range]
        return [len(range(replica, drawn, replicas)) for replica in replica_range]

    def __iter__(self) -> Iterator[Any]:
        parts = self.parts()
        if len(parts) == 1:
            return iter(parts[0])
        rounds = zip_longest(*parts, fillvalue=_NOTHING)
        return (item for round_ in rounds for item in round_ if item is not _NOTHING)

    def __len__(self) -> int:
        return sum(self.lengths())


class StackedBatches(Sampler[list[Any]]):
    """The batches of all replicas that a process feeds, put together to one batch per step.

    Where the replicas' parts are not equally long, a step takes what there still is.

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
        for indices, _ in self.marked():
            yield indices

    def marked(self) -> Iterator[tuple[list[Any], list[bool]]]:
        """Each batch of indices, and which of them were not repeated."""
        streams = [self._batches(part, own) for part, own in self.sampler.counted_parts()]
        for batches in zip_longest(*streams, fillvalue=([], [])):
            indices = [index for batch, _ in batches for index in batch]
            yield indices, [mark for _, marks in batches for mark in marks]

    def _batches(self, items: list[Any], own: int) -> Iterator[tuple[list[Any], list[bool]]]:
        if self.batch_size is None:
            for number, batch in enumerate(map(list, items)):
                yield batch, [number < own] * len(batch)
            return
        for first in range(0, len(items), self.batch_size):
            batch = items[first : first + self.batch_size]
            if len(batch) == self.batch_size or not self.drop_last:
                real = min(max(own - first, 0), len(batch))
                yield batch, [True] * real + [False] * (len(batch) - real)

    def __len__(self) -> int:
        longest = max(self.sampler.lengths())
        if self.batch_size is None:
            return longest
        return longest // self.batch_size if self.drop_last else -(-longest // self.batch_size)


class MarkedBatches(Sampler[list[Any]]):
    """The batches of another sampler, noting for each which of its samples were not repeated.

    Attributes:
        sampler: the batch sampler that is drawn from.
        batch_size: that sampler's, where it has one.
        drop_last: that sampler's.
        marks: where the iteration that begins next leaves its marks, one list for each batch in
            the order drawn. Given anew for each iteration.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.batch_size = getattr(sampler, "batch_size", None)
        self.drop_last = bool(getattr(sampler, "drop_last", False))
        self.marks: deque[list[bool]] = deque()

    def __iter__(self) -> Iterator[list[Any]]:
        # Looked up now: the next iteration may begin before this one has drawn its last batch.
        return self._drawn(self.marks)

    def _drawn(self, marks: deque[list[bool]]) -> Iterator[list[Any]]:
        for indices, mark in self._marked():
            marks.append(mark)
            yield indices

    def _marked(self) -> Iterable[tuple[list[Any], list[bool]]]:
        if isinstance(self.sampler, StackedBatches):
            return self.sampler.marked()
        return ((indices, [True] * len(indices)) for indices in map(list, self.sampler))

    def __len__(self) -> int:
        return len(self.sampler)


_NOTHING = object()


def shard_samplers(
    loader: DataLoader[Any], shard: DataShard, seed: int, duplicates: Duplicates = "keep"
) -> tuple[Any, Any]:
    """What takes the place of ``loader.sampler`` and ``loader.batch_sampler``.

    Sequential and shuffled loaders get torch's ``DistributedSampler``, with the loader's
    ``drop_last``; any other sampler that has a length is dealt by ``ShardedSampler``, and so is a
    batch sampler of the user's own, by whole batches. A distributed sampler that fits the shard
    is kept. With one replica everything is kept. Where a process feeds several replicas, the
    batch sampler's batches are theirs put together.

    ``duplicates``: ``"drop"`` repeats nothing; ``"mask"`` gives a ``MarkedBatches``. The samples
    and their order are the same in both as where duplicates are kept.

    Raises:
        InvalidRequest: a distributed sampler for other replicas, a sampler without a length,
            ``batch_size=None`` where batches of several replicas must be put together or marked,
            or a distributed sampler of the user's own whose duplicates are to be dropped or
            marked.
    """
    dealer = _Dealer(shard, seed, duplicates)
    sampler, batch_sampler = dealer.deal(loader)
    if duplicates != "mask":
        return sampler, batch_sampler
    if batch_sampler is not None:
        return sampler, MarkedBatches(batch_sampler)
    if isinstance(sampler, BatchSampler | StackedBatches):
        return MarkedBatches(sampler), None
    raise no_batches_to_mark()


def no_batches_to_mark() -> InvalidRequest:
    """The error for a loader of single samples."""
    return InvalidRequest(
        "duplicates='mask' marks the samples of a batch, and a loader with batch_size=None has no "
        "batches; give it a batch_size, or choose duplicates='drop'"
    )


class _Dealer:
    """Chooses samplers for the replicas that a process feeds."""

    def __init__(self, shard: DataShard, seed: int, duplicates: Duplicates) -> None:
        self.shard = shard
        self.seed = seed
        self.duplicates = duplicates
        #: Whether each batch is one replica's and goes without marks, so that torch's class does.
        self.single = shard.count == 1 and duplicates != "mask"

    def deal(self, loader: DataLoader[Any]) -> tuple[Any, Any]:
        """``sampler`` and ``batch_sampler`` of the loader for the shard."""
        sampler: Any = loader.sampler
        batch_sampler: Any = loader.batch_sampler
        if batch_sampler is None:
            if type(sampler) is BatchSampler:
                # A dataset that takes a list of indices: its batch sampler stands at this place.
                return self._batches(sampler), None
            if self._stays(sampler):
                return sampler, None
            if self.shard.count > 1:
                raise InvalidRequest(
                    f"this process feeds {self.shard.count} replicas, but a loader with "
                    "batch_size=None has no batches of indices that could be put together for "
                    "them; give it a batch_size, a batch_sampler, or sampler=BatchSampler(...)"
                )
            return self._indices(sampler, drop_last=False), None
        # A loader that was given a batch size made the batch sampler by itself, perhaps one of a
        # class of its own, and that batch sampler can be made again.
        if type(batch_sampler) is BatchSampler or (
            loader.batch_size is not None and isinstance(batch_sampler, BatchSampler)
        ):
            new = self._batches(batch_sampler)
            return (sampler if new is batch_sampler else new.sampler), new
        if self._stays(batch_sampler):
            return sampler, batch_sampler
        drop_last = bool(getattr(batch_sampler, "drop_last", False))
        dealt = self._sharded(batch_sampler, drop_last)
        return sampler, dealt if self.single else StackedBatches(dealt, None, False)

    def _batches(self, batch_sampler: BatchSampler) -> Any:
        sampler = batch_sampler.sampler
        if self._stays(sampler):
            return batch_sampler
        size, drop_last = batch_sampler.batch_size, batch_sampler.drop_last
        sharded = self._indices(sampler, drop_last)
        if self.single:
            return BatchSampler(sharded, size, drop_last)
        return StackedBatches(sharded, size, drop_last)

    def _indices(self, sampler: Any, drop_last: bool) -> Any:
        """A ``ShardedSampler``, or torch's own where it gives the same."""
        _check_length(sampler, self.shard)
        shuffle = _plain_shuffle(sampler)
        if shuffle is None:
            return self._sharded(sampler, drop_last)
        data, shard, seed = sampler.data_source, self.shard, self.seed
        if self.single and self.duplicates == "keep":
            return ReplicaSampler(
                data, shard.replicas, shard.first, shuffle=shuffle, seed=seed, drop_last=drop_last
            )
        # Drawn once, not once per replica.
        return self._sharded(ReplicaSampler(data, 1, 0, shuffle=shuffle, seed=seed), drop_last)

    def _sharded(self, sampler: Any, drop_last: bool) -> ShardedSampler:
        _check_length(sampler, self.shard)
        repeat = self.duplicates != "drop"
        return ShardedSampler(
            sampler, self.shard, seed=self.seed, drop_last=drop_last, repeat=repeat
        )

    def _stays(self, sampler: Any) -> bool:
        """Whether nothing has to be dealt: one replica, or a distributed sampler that fits."""
        fits = _fits(sampler, self.shard)
        if fits and self.shard.replicas > 1 and self.duplicates != "keep":
            raise InvalidRequest(
                f"duplicates='{self.duplicates}' cannot know which samples the loader's "
                f"{type(sampler).__name__} repeats; leave that sampler out (shuffle=True is "
                "enough, setup_dataloaders() shards the data)"
            )
        return fits or self.shard.replicas == 1


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
