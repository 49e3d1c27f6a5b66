"""Who gets which samples: samplers, batch samplers, iterable datasets, and their epochs."""

from __future__ import annotations

import collections
import pickle
import random

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from torchweft.api import DataShard
from torchweft.data.epoch import EpochCounter
from torchweft.data.sampler import (
    MarkedBatches,
    ReplicaSampler,
    ShardedSampler,
    StackedBatches,
    shard_samplers,
)
from torchweft.data.shard import MarkedCollate, Repeated, shard
from torchweft.data.stream import same_stream
from torchweft.errors import InvalidRequest, Misuse

sizes = st.integers(0, 40)
replica_counts = st.integers(2, 6)
seeds = st.integers(0, 2**32 - 1)


def one(replicas, first):
    return DataShard(replicas=replicas, first=first)


def deal(make_loader, replicas, *, seed=0, epoch=0, count=1, duplicates="keep"):
    """What each process's batch sampler gives, from a loader of its own as in real processes."""
    dealt = []
    for first in range(0, replicas, count):
        loader = make_loader()
        share = DataShard(replicas=replicas, first=first, count=count)
        sampler, batch_sampler = shard_samplers(loader, share, seed, duplicates)
        EpochCounter(sampler, batch_sampler).set(epoch)
        dealt.append(list(sampler if batch_sampler is None else batch_sampler))
        assert len(batch_sampler if batch_sampler is not None else sampler) == len(dealt[-1])
    return dealt


def flat(batches):
    return [index for batch in batches for index in batch]


class Backwards(Sampler):
    """A user's own, without any randomness."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return iter(range(self.size - 1, -1, -1))

    def __len__(self):
        return self.size


class Buckets(Sampler):
    """A user's own batch sampler: batches of different sizes, in random order."""

    def __init__(self, sizes):
        self.batches, start = [], 0
        for size in sizes:
            self.batches.append(list(range(start, start + size)))
            start += size

    def __iter__(self):
        for index in torch.randperm(len(self.batches)).tolist():
            yield self.batches[index]

    def __len__(self):
        return len(self.batches)


# -- sequential and shuffled loaders ---------------------------------------------------------------


@given(sizes.filter(bool), replica_counts, st.booleans(), st.booleans(), seeds, st.integers(0, 3))
def test_the_order_is_that_of_a_distributed_sampler(
    size, replicas, shuffle, drop_last, seed, epoch
):
    def make():
        return DataLoader(range(size), batch_size=3, shuffle=shuffle, drop_last=drop_last)

    dealt = deal(make, replicas, seed=seed, epoch=epoch)
    for rank in range(replicas):
        reference = DistributedSampler(
            range(size), replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
        reference.set_epoch(epoch)
        assert dealt[rank] == list(BatchSampler(reference, 3, drop_last))


@given(sizes.filter(bool), replica_counts, st.booleans(), seeds)
def test_replicas_together_see_the_dataset_and_padding_from_its_start(
    size, replicas, shuffle, seed
):
    dealt = deal(
        lambda: DataLoader(range(size), batch_size=4, shuffle=shuffle), replicas, seed=seed
    )
    parts = [flat(batches) for batches in dealt]
    assert len({len(part) for part in parts}) == 1
    assert [list(map(len, batches)) for batches in dealt] == [list(map(len, dealt[0]))] * replicas
    together = [index for round_ in zip(*parts, strict=True) for index in round_]
    assert sorted(together[:size]) == list(range(size))
    assert together[size:] == (together[:size] * replicas)[: len(together) - size]


def test_the_sampler_is_torchs_distributed_sampler():
    loader = DataLoader(range(10), batch_size=3, shuffle=True, drop_last=True)
    sampler, batch_sampler = shard_samplers(loader, one(4, 1), 5)
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.num_replicas, sampler.rank, sampler.seed) == (4, 1, 5)
    assert sampler.shuffle
    assert sampler.drop_last
    assert type(batch_sampler) is BatchSampler
    assert batch_sampler.sampler is sampler
    assert (batch_sampler.batch_size, batch_sampler.drop_last) == (3, True)


def test_uneven_final_batches():
    dealt = deal(lambda: DataLoader(range(11), batch_size=2), 2)
    assert dealt == [[[0, 2], [4, 6], [8, 10]], [[1, 3], [5, 7], [9, 0]]]
    dealt = deal(lambda: DataLoader(range(9), batch_size=2), 2)
    assert dealt == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], [0]]]
    dealt = deal(lambda: DataLoader(range(9), batch_size=3, drop_last=True), 2)
    assert dealt == [[[0, 2, 4]], [[1, 3, 5]]]


def test_an_empty_dataset_gives_nothing_to_anybody():
    assert deal(lambda: DataLoader([]), 3) == [[], [], []]
    assert deal(lambda: DataLoader([], sampler=[]), 3) == [[], [], []]


def test_without_batches_the_sampler_alone_is_sharded():
    dealt = deal(lambda: DataLoader(range(5), batch_size=None), 2)
    assert dealt == [[0, 2, 4], [1, 3, 0]]


def test_a_sampler_of_batches_for_a_dataset_that_takes_lists():
    def make():
        batches = BatchSampler(SequentialSampler(range(8)), 2, False)
        return DataLoader(range(8), batch_size=None, sampler=batches)

    assert deal(make, 2) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


@pytest.mark.parametrize("shuffle", [True, False])
def test_one_replica_keeps_everything(shuffle):
    loader = DataLoader(range(10), shuffle=shuffle)
    assert shard_samplers(loader, DataShard(), 0) == (loader.sampler, loader.batch_sampler)
    for batch_sampler in (Buckets([1, 2]), BatchSampler(SequentialSampler(range(4)), 2, False)):
        loader = DataLoader(range(10), batch_sampler=batch_sampler)
        assert shard_samplers(loader, DataShard(), 0) == (loader.sampler, batch_sampler)


# -- other samplers --------------------------------------------------------------------------------


def weighted(size):
    return WeightedRandomSampler(torch.arange(1.0, size + 1), num_samples=size)


def with_generator(size):
    # Every process may have seeded it otherwise, or drawn from it before.
    generator = torch.Generator()
    generator.seed()
    return SubsetRandomSampler(range(size), generator=generator)


class PythonShuffle(Backwards):
    def __iter__(self):
        return iter(random.sample(range(self.size), self.size))


class NumpyShuffle(Backwards):
    def __iter__(self):
        return iter(numpy.random.permutation(self.size).tolist())


class OwnStreams(Backwards):
    """Holds generators of every kind, which no two processes have seeded alike."""

    def __init__(self, size):
        super().__init__(size)
        self.python = random.Random()
        self.new = numpy.random.default_rng()
        self.old = numpy.random.RandomState()
        self.inner = with_generator(size)

    def __iter__(self):
        order = list(self.inner)
        self.python.shuffle(order)
        return iter(self.old.permutation(self.new.permutation(order)).tolist())


SAMPLERS = {
    "weighted": weighted,
    "generator": with_generator,
    "shuffled, generator": lambda size: RandomSampler(
        range(size), generator=with_generator(1).generator
    ),
    "replacement": lambda size: RandomSampler(range(size), replacement=True),
    "more samples": lambda size: RandomSampler(range(size), num_samples=2 * size + 1),
    "own": Backwards,
    "python": PythonShuffle,
    "numpy": NumpyShuffle,
    "streams": OwnStreams,
    "list": lambda size: list(range(size))[::-1],
}


@pytest.mark.parametrize("name", SAMPLERS)
@given(size=sizes.filter(bool), replicas=replica_counts, seed=seeds, drop_last=st.booleans())
def test_any_sampler_is_drawn_alike_everywhere_and_dealt(name, size, replicas, seed, drop_last):
    def make():
        sampler = SAMPLERS[name](size)
        return DataLoader(range(size), batch_size=2, sampler=sampler, drop_last=drop_last)

    random.seed()  # the ranks' own streams have nothing in common
    torch.seed()
    dealt = deal(make, replicas, seed=seed)
    assert dealt == deal(make, replicas, seed=seed)
    assert len({tuple(map(len, batches)) for batches in dealt}) == 1
    parts = []
    for rank in range(replicas):
        loader = make()
        sampler, _ = shard_samplers(loader, one(replicas, rank), seed)
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1])
    together = [index for round_ in zip(*parts, strict=True) for index in round_]
    drawn = len(make().sampler)
    if name not in ("weighted", "replacement", "more samples"):
        whole = together[:drawn]
        assert sorted(whole) == list(range(size)) or (
            drop_last and len(set(whole)) == len(whole) == drawn - drawn % replicas
        )
    if drop_last:
        assert len(together) == drawn - drawn % replicas
    else:
        assert together[drawn:] == (together[:drawn] * replicas)[: len(together) - drawn]


@pytest.mark.parametrize("name", ["weighted", "generator", "python", "numpy", "streams"])
def test_every_epoch_is_drawn_anew(name):
    sampler = ShardedSampler(SAMPLERS[name](50), one(2, 0), seed=3, drop_last=False)
    epochs = []
    for epoch in (0, 1, 2, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[3]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_generator_of_the_users_is_left_as_it_was():
    loader = DataLoader(
        range(20), sampler=RandomSampler(range(20), True, generator=torch.Generator())
    )
    before = loader.sampler.generator.get_state()
    sampler, _ = shard_samplers(loader, one(2, 0), 0)
    assert len(list(sampler)) == 10
    assert torch.equal(loader.sampler.generator.get_state(), before)


def test_a_draw_leaves_no_trace_in_the_global_streams():
    def numbers():
        return torch.rand(1).item(), random.random(), numpy.random.rand(), torch.initial_seed()

    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    expected = numbers()
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    with pytest.raises(KeyError), same_stream(2**40, OwnStreams(3)):
        numbers()
        raise KeyError
    assert numbers() == expected


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_shuffle_that_is_no_permutation_is_not_taken_for_one(drop_last):
    for sampler in (RandomSampler(range(6), True), RandomSampler(range(6), num_samples=4)):
        loader = DataLoader(range(6), sampler=sampler, drop_last=drop_last)
        sharded, _ = shard_samplers(loader, one(2, 0), 0)
        assert type(sharded) is ShardedSampler
        assert sharded.drop_last is drop_last


# -- batch samplers --------------------------------------------------------------------------------


def test_torchs_batch_sampler_is_made_again_around_the_sharded_sampler():
    def make():
        inner = BatchSampler(SequentialSampler(range(10)), batch_size=2, drop_last=True)
        return DataLoader(range(10), batch_sampler=inner)

    assert deal(make, 3) == [[[0, 3]], [[1, 4]], [[2, 5]]]
    sampler, batch_sampler = shard_samplers(make(), one(3, 0), 0)
    assert batch_sampler.sampler is sampler
    assert type(sampler) is ReplicaSampler


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), replica_counts, seeds)
def test_a_batch_sampler_of_the_users_is_dealt_by_whole_batches(sizes, replicas, seed):
    dealt = deal(lambda: DataLoader(range(60), batch_sampler=Buckets(sizes)), replicas, seed=seed)
    assert len({len(batches) for batches in dealt}) == 1
    together = [batch for round_ in zip(*dealt, strict=True) for batch in round_]
    whole = together[: len(sizes)]
    assert sorted(whole) == Buckets(sizes).batches
    assert together[len(sizes) :] == (whole * replicas)[: len(together) - len(sizes)]


def test_a_batch_sampler_with_drop_last_drops_batches_rather_than_repeating():
    class Dropping(BatchSampler):
        pass

    def make():
        return DataLoader(
            range(10), batch_sampler=Dropping(SequentialSampler(range(10)), 3, drop_last=True)
        )

    assert deal(make, 2) == [[[0, 1, 2]], [[3, 4, 5]]]


def test_lists_of_batches():
    batches = [[0, 1], [2], [3, 4, 5]]
    dealt = deal(lambda: DataLoader(range(6), batch_sampler=batches), 2)
    assert dealt == [[[0, 1], [3, 4, 5]], [[2], [0, 1]]]


# -- several replicas in one process ---------------------------------------------------------------


LOADERS = {
    "sequential": lambda size: DataLoader(range(size), batch_size=3),
    "shuffled": lambda size: DataLoader(range(size), batch_size=3, shuffle=True),
    "dropping": lambda size: DataLoader(range(size), batch_size=3, shuffle=True, drop_last=True),
    "weighted": lambda size: DataLoader(range(size), batch_size=2, sampler=weighted(size)),
    "buckets": lambda size: DataLoader(
        range(size * 5), batch_sampler=Buckets([index % 4 + 1 for index in range(size)])
    ),
    "batches": lambda size: DataLoader(
        range(size), batch_size=None, sampler=BatchSampler(RandomSampler(range(size)), 3, False)
    ),
}


@pytest.mark.parametrize("name", LOADERS)
@given(
    size=sizes.filter(bool),
    processes=st.integers(1, 3),
    count=st.integers(2, 4),
    seed=seeds,
    epoch=st.integers(0, 2),
)
def test_a_process_with_several_replicas_gets_their_batches_put_together(
    name, size, processes, count, seed, epoch
):
    replicas = processes * count
    single = deal(lambda: LOADERS[name](size), replicas, seed=seed, epoch=epoch)
    for first in range(0, replicas, count):
        loader = LOADERS[name](size)
        share = DataShard(replicas=replicas, first=first, count=count)
        sampler, batch_sampler = shard_samplers(loader, share, seed)
        drawn = sampler if batch_sampler is None else batch_sampler
        EpochCounter(sampler, batch_sampler).set(epoch)
        mine = single[first : first + count]
        assert list(drawn) == [flat(step) for step in zip(*mine, strict=True)]
        assert len(drawn) == len(mine[0])


def test_the_batches_of_several_replicas_know_their_size():
    loader = DataLoader(range(10), batch_size=2)
    sampler, batch_sampler = shard_samplers(loader, DataShard(replicas=2, count=2), 0)
    assert type(batch_sampler) is StackedBatches
    assert (batch_sampler.batch_size, batch_sampler.drop_last) == (2, False)
    assert batch_sampler.sampler is sampler
    assert list(sampler) == list(range(10))
    assert len(sampler) == 10


def test_single_samples_cannot_be_put_together():
    loader = DataLoader(range(10), batch_size=None)
    message = (
        "this process feeds 4 replicas, but a loader with batch_size=None has no batches of "
        "indices that could be put together for them; give it a batch_size, a batch_sampler, or "
        r"sampler=BatchSampler\(...\)"
    )
    with pytest.raises(InvalidRequest, match=message):
        shard_samplers(loader, DataShard(replicas=4, count=4), 0)


# -- without duplicates ----------------------------------------------------------------------------


def deal_marked(make_loader, replicas, *, seed=0, epoch=0, count=1):
    """The batches of each process and, beside them, the marks of each."""
    dealt, marks = [], []
    for first in range(0, replicas, count):
        share = DataShard(replicas=replicas, first=first, count=count)
        sampler, batch_sampler = shard_samplers(make_loader(), share, seed, "mask")
        drawn = sampler if batch_sampler is None else batch_sampler
        assert isinstance(drawn, MarkedBatches)
        EpochCounter(sampler, batch_sampler).set(epoch)
        dealt.append(list(drawn))
        marks.append(list(drawn.marks))
        assert len(drawn) == len(dealt[-1]) == len(marks[-1])
    return dealt, marks


@pytest.mark.parametrize("name", LOADERS)
@given(
    size=sizes,
    processes=st.integers(1, 4),
    count=st.integers(1, 3),
    seed=seeds,
    epoch=st.integers(0, 2),
)
def test_dropped_and_masked_are_what_is_kept_without_what_is_repeated(
    name, size, processes, count, seed, epoch
):
    if not size and name != "sequential":
        return
    options = {"seed": seed, "epoch": epoch, "count": count}
    replicas = processes * count
    kept = deal(lambda: LOADERS[name](size), replicas, **options)
    dropped = deal(lambda: LOADERS[name](size), replicas, **options, duplicates="drop")
    masked, marks = deal_marked(lambda: LOADERS[name](size), replicas, **options)
    # With one replica the user's own sampler draws, from the global stream.
    if replicas > 1:
        assert masked == kept
    assert len({len(batches) for batches in masked}) == 1
    assert [list(map(len, m)) for m in marks] == [list(map(len, b)) for b in masked]
    real = [
        [index for index, mark in zip(flat(b), flat(m), strict=True) if mark]
        for b, m in zip(masked, marks, strict=True)
    ]
    if replicas > 1 and name != "dropping":
        assert list(map(flat, dropped)) == real
    if name == "sequential":
        assert sorted(flat(real)) == list(range(size))
    elif name in ("shuffled", "batches", "buckets"):
        everything = sorted(flat(real))
        assert everything == sorted(set(everything))
        assert len(everything) == (
            size
            if name != "buckets"
            else sum(map(len, Buckets([index % 4 + 1 for index in range(size)]).batches))
        )
    elif name == "dropping":
        assert all(flat(process) == [True] * len(flat(process)) for process in marks)


def test_uneven_final_batches_without_duplicates():
    def make(**options):
        return lambda: DataLoader(range(9), batch_size=2, **options)

    assert deal(make(), 2, duplicates="drop") == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7]]]
    assert deal_marked(make(), 2) == (
        [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], [0]]],
        [[[True, True], [True, True], [True]], [[True, True], [True, True], [False]]],
    )
    assert deal(make(), 4, count=2, duplicates="drop") == [
        [[0, 4, 1, 5], [8]],
        [[2, 6, 3, 7]],
    ]
    # Whoever leaves out what does not fill a batch repeats nothing.
    dropping = make(drop_last=True)
    assert (
        deal(dropping, 2, duplicates="drop")
        == deal(dropping, 2)
        == [
            [[0, 2], [4, 6]],
            [[1, 3], [5, 7]],
        ]
    )


def test_fewer_samples_than_replicas_without_duplicates():
    loader = DataLoader(range(1), batch_size=2)
    assert deal(lambda: loader, 3, duplicates="drop") == [[[0]], [], []]
    assert deal_marked(lambda: loader, 3) == ([[[0]]] * 3, [[[True]], [[False]], [[False]]])


def test_single_samples_can_be_dropped_and_not_masked():
    def make():
        return DataLoader(range(5), batch_size=None)

    assert deal(make, 2, duplicates="drop") == [[0, 2, 4], [1, 3]]
    message = (
        "duplicates='mask' marks the samples of a batch, and a loader with batch_size=None has no "
        "batches; give it a batch_size, or choose duplicates='drop'"
    )
    with pytest.raises(InvalidRequest, match=message):
        deal_marked(make, 2)


def test_batches_that_are_no_lists_are_dealt_as_they_are():
    slices = [slice(0, 2), slice(2, 4), slice(4, 6)]
    dealt = deal(lambda: DataLoader(range(6), batch_sampler=slices), 2, duplicates="drop")
    assert dealt == [[slices[0], slices[2]], [slices[1]]]


def test_the_duplicates_of_another_distributed_sampler_are_not_known():
    for make in (
        lambda: DataLoader(range(8), sampler=DistributedSampler(range(8), 2, 0)),
        lambda: DataLoader(range(8), batch_sampler=LibrarySampler(8, 2, 0)),
    ):
        for duplicates in ("drop", "mask"):
            message = (
                rf"duplicates='{duplicates}' cannot know which samples the loader's \w+Sampler "
                r"repeats; leave that sampler out \(shuffle=True is enough, setup_dataloaders\(\) "
                r"shards the data\)"
            )
            with pytest.raises(InvalidRequest, match=message):
                shard_samplers(make(), one(2, 0), 0, duplicates)


def test_iterations_under_way_keep_their_marks_apart():
    _, batches = shard_samplers(DataLoader(range(5), batch_size=2), one(2, 1), 0, "mask")
    first, second = collections.deque(), collections.deque()
    batches.marks = first
    one_ = iter(batches)
    batches.marks = second
    two = iter(batches)
    assert [*one_] == [*two] == [[1, 3], [0]]
    assert first == second == collections.deque([[True, True], [False]])


# -- samplers that are distributed already ---------------------------------------------------------


class LibrarySampler(Backwards):
    """Distributed, but no subclass of torch's."""

    def __init__(self, size, num_replicas, rank):
        super().__init__(size)
        self.num_replicas, self.rank = num_replicas, rank


class Grouped(BatchSampler):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(range(8), sampler=DistributedSampler(range(8), 2, 1)),
        lambda: DataLoader(range(8), sampler=DistributedSampler(range(8), 2, 1), batch_size=None),
        lambda: DataLoader(range(8), sampler=LibrarySampler(8, 2, 1)),
        lambda: DataLoader(range(8), batch_sampler=LibrarySampler(8, 2, 1)),
        lambda: DataLoader(
            range(8), batch_sampler=BatchSampler(DistributedSampler(range(8), 2, 1), 2, False)
        ),
        lambda: DataLoader(
            range(8), batch_sampler=Grouped(DistributedSampler(range(8), 2, 1), 2, False)
        ),
    ],
)
def test_a_distributed_sampler_that_fits_is_kept(make):
    loader = make()
    assert shard_samplers(loader, one(2, 1), 0) == (loader.sampler, loader.batch_sampler)
    message = r"Sampler is for rank 1 of 2, but this process feeds replica 0 of 2; leave that"
    with pytest.raises(InvalidRequest, match=message):
        shard_samplers(make(), one(2, 0), 0)


def test_the_error_for_a_distributed_sampler_of_other_replicas():
    loader = DataLoader(range(8), sampler=DistributedSampler(range(8), 4, 3))
    message = (
        "the loader's DistributedSampler is for rank 3 of 4, but this process feeds replica 0 of "
        r"1; leave that sampler out \(shuffle=True is enough, setup_dataloaders\(\) shards the "
        r"data\), or keep it as it is with use_distributed_sampler=False"
    )
    with pytest.raises(InvalidRequest, match=message):
        shard_samplers(loader, DataShard(), 0)
    with pytest.raises(InvalidRequest, match="but this process feeds replicas 2 to 3 of 4"):
        shard_samplers(loader, DataShard(replicas=4, first=2, count=2), 0)


class Endless(Sampler):
    def __iter__(self):
        return iter(int, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(range(8), sampler=Endless()),
        lambda: DataLoader(range(8), sampler=Endless(), batch_size=None),
        lambda: DataLoader(range(8), batch_sampler=BatchSampler(Endless(), 2, False)),
        lambda: DataLoader(range(8), batch_sampler=Endless()),
    ],
)
def test_a_sampler_without_a_length_is_an_error(make):
    message = (
        "the loader's sampler Endless has no length, so what it draws cannot be dealt to 2 "
        "replicas in equal parts; give it a __len__, or shard the data yourself and pass "
        "use_distributed_sampler=False"
    )
    with pytest.raises(InvalidRequest, match=message):
        shard_samplers(make(), one(2, 0), 0)
    loader = make()
    assert shard_samplers(loader, DataShard(), 0) == (loader.sampler, loader.batch_sampler)


def test_a_batch_sampler_that_the_loader_made_is_made_again():
    class Own(BatchSampler):
        """What a subclass of DataLoader makes from the batch size that it was given."""

    class Loader(DataLoader):
        def __init__(self, data, batch_size):
            super().__init__(data, batch_size)
            batches = Own(self.sampler, batch_size, False)
            object.__setattr__(self, "batch_sampler", batches)

    assert deal(lambda: Loader(range(7), 2), 2) == [[[0, 2], [4, 6]], [[1, 3], [5, 0]]]


# -- epochs ----------------------------------------------------------------------------------------


class Told:
    """Wants to know the epoch, and does not show it."""

    def __init__(self, sampler=None):
        self.epochs = []
        self.sampler = sampler

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class Converting(Told):
    """Shows the epoch as a number of its own making."""

    epoch = -1

    def set_epoch(self, epoch):
        super().set_epoch(epoch)
        self.epoch = numpy.int64(epoch)


def test_epochs_are_counted_from_zero_and_told_to_all():
    inner, converting = Told(), Converting()
    outer = Told(inner)
    sampler = DistributedSampler(range(4), 2, 0)
    counter = EpochCounter(None, [0, 1], outer, converting, sampler, outer)
    assert [counter.start() for _ in range(3)] == [0, 1, 2]
    assert outer.epochs == inner.epochs == converting.epochs == [0, 1, 2]
    assert sampler.epoch == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReplicaSampler(range(4), 2, 0),
        lambda: DistributedSampler(range(4), 2, 0),
        lambda: ShardedSampler(Backwards(4), one(2, 0), seed=0, drop_last=False),
        Converting,
    ],
)
def test_a_user_who_sets_the_epoch_is_heard_and_the_count_goes_on_from_there(make):
    sampler = make()
    counter = EpochCounter(sampler)
    sampler.set_epoch(0)
    assert counter.start() == 0
    assert counter.start() == 1
    sampler.set_epoch(5)
    assert [counter.start(), counter.start()] == [5, 6]
    sampler.set_epoch(3)
    assert [counter.start(), counter.start()] == [3, 4]
    assert sampler.epoch == 4


@pytest.mark.parametrize("passes", [1, 2])
def test_a_loop_that_sets_every_epoch_gets_what_it_sets(passes):
    sampler = ReplicaSampler(range(4), 2, 0)
    counter = EpochCounter(sampler)
    started = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        started += [counter.start() for _ in range(passes)]
    assert started[::passes] == [0, 1, 2, 3]
    assert started[passes - 1 :: passes] == [epoch + passes - 1 for epoch in range(4)]


def test_a_sampler_that_was_resumed_before_setup_starts_where_it_stands():
    sampler = DistributedSampler(range(4), 2, 0)
    sampler.set_epoch(7)
    counter = EpochCounter(sampler)
    assert [counter.start(), counter.start()] == [7, 8]


def test_a_sampler_that_counts_by_itself():
    class Counting(Sampler):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            self.epoch += 1
            return iter(())

    sampler = Counting()
    counter = EpochCounter(sampler)
    started = []
    for _ in range(3):
        started.append(counter.start())
        list(sampler)
    assert started == [0, 1, 2]


def test_setting_the_epoch_of_the_loader():
    sampler = ReplicaSampler(range(4), 2, 0)
    counter = EpochCounter(sampler)
    counter.set(3)
    assert sampler.epoch == 3
    assert [counter.start(), counter.start()] == [3, 4]
    sampler.set_epoch(9)
    counter.set(2)
    assert counter.start() == 2
    counter.set(2)
    sampler.set_epoch(0)
    assert counter.start() == 0
    for wrong in (-1, 1.5, True, "1"):
        with pytest.raises(InvalidRequest, match=r"set_epoch\(.*\): an epoch is a whole number, 0"):
            counter.set(wrong)


def test_the_epoch_to_go_on_with():
    sampler = ReplicaSampler(range(4), 2, 0)
    counter = EpochCounter(sampler)
    assert (counter.current, counter.idle) == (0, True)
    counter.start()
    assert (counter.current, counter.idle) == (0, False)
    counter.end()
    assert (counter.current, counter.idle) == (1, True)
    sampler.set_epoch(5)
    assert counter.current == 5
    counter.start()
    assert (counter.current, counter.idle) == (5, False)
    counter.set(2)
    assert (counter.current, counter.idle) == (2, True)
    assert counter.start() == 2


def test_a_dealt_sampler_passes_the_epoch_on():
    inner = Told(Told())
    sampler = ShardedSampler(inner, one(2, 0), seed=0, drop_last=False)
    sampler.set_epoch(4)
    assert inner.epochs == inner.sampler.epochs == [4]


# -- iterable datasets -----------------------------------------------------------------------------


class Numbers(IterableDataset):
    def __init__(self, size):
        self.size = size
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(range(self.size))


class SizedNumbers(Numbers):
    def __len__(self):
        return self.size


def parts_of(size, replicas, count=1, **attributes):
    parts = []
    for first in range(0, replicas, count):
        dataset = shard(SizedNumbers(size))
        vars(dataset).update(attributes)
        dataset.shard = DataShard(replicas=replicas, first=first, count=count)
        parts.append(list(dataset))
        assert len(dataset) == len(parts[-1])
    return parts


@given(sizes, replica_counts)
def test_replicas_take_every_nth_sample_and_equally_many(size, replicas):
    parts = parts_of(size, replicas)
    assert len({len(part) for part in parts}) == 1
    together = [sample for round_ in zip(*parts, strict=True) for sample in round_]
    assert together[:size] == list(range(size))
    assert set(together) == set(range(size))


@given(sizes, st.integers(1, 3), st.integers(2, 3))
def test_several_replicas_of_a_process_take_theirs_in_turn(size, processes, count):
    single = parts_of(size, processes * count)
    for number, part in enumerate(parts_of(size, processes * count, count)):
        mine = single[number * count : (number + 1) * count]
        assert part == [sample for round_ in zip(*mine, strict=True) for sample in round_]


@given(sizes, st.integers(1, 3), st.integers(1, 3))
def test_samples_of_an_iterable_dataset_once_in_all(size, processes, count):
    parts = parts_of(size, processes * count, count, repeat=False)
    assert sorted(flat(parts)) == list(range(size))
    marked = parts_of(size, processes * count, count, mark=True)
    assert len({len(part) for part in marked}) <= 1 or count > 1
    assert [[s for s in part if not isinstance(s, Repeated)] for part in marked] == parts
    kept = parts_of(size, processes * count, count)
    assert [[getattr(s, "sample", s) for s in part] for part in marked] == kept


def test_marked_samples_are_collated_with_a_mask():
    collate = pickle.loads(pickle.dumps(MarkedCollate(torch.tensor)))
    batch, mask = collate([5, Repeated(6), 7])
    assert batch.tolist() == [5, 6, 7]
    assert mask.dtype is torch.bool
    assert mask.tolist() == [True, False, True]


def test_nothing_is_known_of_other_processes_before_setup():
    assert list(shard(Numbers(5))) == [0, 1, 2, 3, 4]


def test_workers_divide_a_replicas_part():
    seen = collections.Counter()
    steps = []
    for first in range(2):
        dataset = shard(SizedNumbers(11))
        dataset.shard = one(2, first)
        loader = DataLoader(dataset, batch_size=2, num_workers=2)
        batches = [batch.tolist() for batch in loader]
        steps.append([len(batch) for batch in batches])
        seen.update(flat(batches))
    assert steps[0] == steps[1]
    assert set(seen) == set(range(11))
    assert sum(seen.values()) == 12


def test_a_sharded_dataset_is_its_original_to_others():
    dataset = shard(Numbers(3))
    assert dataset.size == 3
    dataset.set_epoch(2)
    assert dataset.epoch == 2
    assert isinstance(dataset, IterableDataset)
    assert not hasattr(dataset, "__len__")
    assert not hasattr(dataset, "other")
    dataset.shard = one(2, 1)
    copied = pickle.loads(pickle.dumps(dataset))
    assert list(copied) == list(dataset) == [1, 2]
    counter = EpochCounter(dataset)
    counter.start()
    assert dataset.dataset.epoch == 2


def test_what_cannot_be_sharded():
    message = (
        r"torchweft.shard\(\) takes an IterableDataset, not a list; data that is read by index is "
        r"sharded by fabric.setup_dataloaders\(loader\) as it is"
    )
    with pytest.raises(InvalidRequest, match=message):
        shard([1, 2, 3])
    with pytest.raises(Misuse, match="was given a dataset that it made; shard a dataset once"):
        shard(shard(Numbers(3)))
