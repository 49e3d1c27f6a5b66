"""The loader that ``setup_dataloaders`` returns."""

from __future__ import annotations

import multiprocessing
import random
import warnings

import numpy
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    get_worker_info,
)

from torchweft.api import DataShard
from torchweft.data.shard import shard
from torchweft.errors import InvalidRequest, Misuse
from torchweft.wrappers.dataloader import FabricDataLoader, wrap_loader


def wrap(loader, replicas=1, first=0, *, move=None, boundary=None, count=1, **options):
    share = DataShard(replicas=replicas, first=first, count=count)
    return wrap_loader(loader, shard=share, move=move, boundary=boundary, **options)


def values(loader):
    return [batch.tolist() for batch in loader]


class Draws(Dataset):
    """What a worker draws: from Python, NumPy and torch, and torch's seed."""

    def __init__(self, size=4):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        worker = get_worker_info()
        return (
            -1 if worker is None else worker.id,
            random.random(),
            float(numpy.random.rand()),
            float(torch.rand(1)),
            torch.initial_seed(),
        )


class Numbers(IterableDataset):
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return iter(range(self.size))


class SizedNumbers(Numbers):
    def __len__(self):
        return self.size


def as_tuples(samples):
    return [tuple(sample) for sample in samples]


class Recording:
    """A user's own ``worker_init_fn``, which sees what the worker was seeded with."""

    def __init__(self, queue):
        self.queue = queue

    def __call__(self, worker_id):
        self.queue.put((worker_id, torch.initial_seed()))


# -- being the original ----------------------------------------------------------------------------


class Weird(DataLoader):
    """A subclass whose constructor takes something else and must not be called again."""

    made = 0

    def __init__(self, numbers, *, flavour):
        type(self).made += 1
        super().__init__(numbers, batch_size=2, shuffle=True, collate_fn=list)
        self.flavour = flavour

    @property
    def described(self):
        return f"{self.flavour} of {len(self.dataset)}"

    def __iter__(self):
        for batch in super().__iter__():
            yield [self.flavour, *batch]


def test_a_subclass_keeps_its_attributes_and_its_iteration():
    original = Weird(range(8), flavour="sour")
    made = Weird.made
    loader = wrap(original, 2, 1)
    assert Weird.made == made
    assert loader.flavour == "sour"
    assert loader.described == "sour of 8"
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    assert {batch[0] for batch in batches} == {"sour"}
    reference = DistributedSampler(range(8), 2, 1)
    assert [index for batch in batches for index in batch[1:]] == list(reference)


def test_it_is_used_as_the_original_is():
    dataset, generator = list(range(10)), torch.Generator()
    original = DataLoader(dataset, 4, shuffle=True, drop_last=True, generator=generator)
    loader = wrap(original, 2, 0)
    assert isinstance(loader, DataLoader)
    assert isinstance(loader, FabricDataLoader)
    assert loader.dataset is dataset
    assert loader.batch_size == 4
    assert loader.drop_last is True
    assert loader.num_workers == 0
    assert loader.generator is generator
    assert loader.collate_fn is original.collate_fn
    assert loader.multiprocessing_context is None
    assert loader.pin_memory is False
    assert isinstance(loader.sampler, DistributedSampler)
    assert loader.batch_sampler.sampler is loader.sampler
    assert len(loader) == 1
    assert "dataset" in dir(loader)
    assert repr(loader) == f"FabricDataLoader({loader._FabricDataLoader__loader!r})"
    with pytest.raises(AttributeError, match="'DataLoader' object has no attribute 'flavour'"):
        _ = loader.flavour


def test_the_original_stays_as_it_is():
    original = DataLoader(range(10), shuffle=True, num_workers=2)
    before = dict(vars(original))
    wrap(original, 2, 0)
    assert vars(original) == before


def test_attributes_are_set_on_the_loader():
    loader = wrap(DataLoader(range(4), batch_size=2), 2, 0)
    loader.collate_fn = sum
    loader.note = "mine"
    assert list(loader) == [0 + 2]
    assert loader.note == "mine"
    del loader.note
    assert not hasattr(loader, "note")
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):
        loader.batch_size = 3
    with pytest.raises(ValueError, match="multiprocessing_context can only be used with"):
        loader.multiprocessing_context = "spawn"


def test_one_replica_leaves_the_loader_as_it_is():
    original = DataLoader(range(10), batch_size=3, shuffle=True, num_workers=2)
    loader = wrap(original)
    assert loader.sampler is original.sampler
    assert loader.batch_sampler is original.batch_sampler
    assert loader.worker_init_fn is None
    torch.manual_seed(3)
    expected = [index for batch in values(original) for index in batch]
    torch.manual_seed(3)
    assert [index for batch in values(loader) for index in batch] == expected


def test_sharding_may_be_declined():
    sampler = DistributedSampler(range(8), 4, 3)
    original = DataLoader(range(8), sampler=sampler, batch_size=2)
    loader = wrap(original, 2, 0, use_distributed_sampler=False)
    assert loader.sampler is sampler
    assert loader.batch_sampler is original.batch_sampler
    assert len(loader) == 1


def test_what_is_no_loader():
    message = (
        r"fabric.setup_dataloaders\(\) takes a torch.utils.data.DataLoader, not a list; put the "
        "data into one, or iterate over it as it is and bring each batch to the device with "
        r"fabric.to_device\(batch\)"
    )
    with pytest.raises(InvalidRequest, match=message):
        wrap([1, 2, 3])


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_loader_is_set_up_once(replicas):
    message = (
        r"this loader was already set up; use what fabric.setup_dataloaders\(\) returned, and set "
        "every loader up once"
    )
    with pytest.raises(Misuse, match=message):
        wrap(wrap(DataLoader(range(4)), replicas), replicas)


def test_the_seed_decides_the_order():
    orders = [values(wrap(DataLoader(range(50), shuffle=True), 2, 0, seed=s)) for s in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]


# -- several replicas ------------------------------------------------------------------------------


def test_a_process_with_several_replicas_gets_one_batch_for_all():
    def make():
        return DataLoader(range(11), batch_size=2)

    loader = wrap(make(), 4, 2, count=2)
    assert loader.batch_size == 2
    assert len(loader) == 2
    assert values(loader) == [[2, 6, 3, 7], [10, 0]]
    singles = [values(wrap(make(), 4, first)) for first in (2, 3)]
    assert values(loader) == [a + b for a, b in zip(*singles, strict=True)]


def test_lengths_and_batches_of_a_custom_batch_sampler():
    batches = [[0, 1, 2], [3], [4, 5], [6, 7]]
    loader = wrap(DataLoader(range(8), batch_sampler=batches), 2, 1)
    assert len(loader) == 2
    assert values(loader) == [[3], [6, 7]]


@pytest.mark.parametrize(("drop_last", "expected"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_an_iterable_dataset_is_batched_for_all_replicas_of_the_process(drop_last, expected):
    dataset = shard(SizedNumbers(10))
    loader = wrap(DataLoader(dataset, batch_size=2, drop_last=drop_last), 2, 0, count=2)
    assert len(loader) == len(expected)
    assert [len(batch) for batch in loader] == expected
    assert loader.batch_size == 2


# -- iterable datasets -----------------------------------------------------------------------------


def test_every_rank_sees_the_same_samples_of_an_iterable_dataset_with_one_warning():
    message = (
        "every rank will see the same samples of the iterable dataset Numbers, unless it divides "
        r"them among the ranks by itself; torchweft.shard\(dataset\) divides them; "
        "use_distributed_sampler=False says that it is as you want it"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        first = wrap(DataLoader(Numbers(4), batch_size=2), 2, 0)
    assert len(caught) == 1
    second = wrap(DataLoader(Numbers(4), batch_size=2), 2, 1)
    assert values(first) == values(second) == [[0, 1], [2, 3]]


def test_no_warning_where_there_is_nothing_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(DataLoader(Numbers(4)))
        wrap(DataLoader(Numbers(4)), 2, 0, use_distributed_sampler=False)
        wrap(DataLoader(shard(Numbers(4))), 2, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sharded_iterable_dataset_is_told_its_replica(workers):
    seen = []
    for first in range(2):
        loader = DataLoader(shard(SizedNumbers(10)), batch_size=2, num_workers=workers)
        wrapped = wrap(loader, 2, first)
        assert wrapped.dataset is loader.dataset
        assert len(wrapped) == 3
        seen.append(sorted(index for batch in values(wrapped) for index in batch))
    assert seen == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


# -- epochs ----------------------------------------------------------------------------------------


def expected_order(size, epoch, seed=0):
    sampler = DistributedSampler(range(size), 2, 0, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def order(loader):
    return [index for batch in values(loader) for index in batch]


@pytest.mark.parametrize("workers", [0, 1])
def test_every_iteration_is_an_epoch(workers):
    loader = wrap(DataLoader(range(20), shuffle=True, num_workers=workers), 2, 0)
    assert [order(loader) for _ in range(3)] == [expected_order(20, epoch) for epoch in range(3)]


def test_a_user_who_sets_the_epoch_is_heard():
    loader = wrap(DataLoader(range(20), shuffle=True), 2, 0)
    loader.sampler.set_epoch(4)
    assert order(loader) == expected_order(20, 4)
    assert order(loader) == expected_order(20, 5)
    loader.sampler.set_epoch(5)
    assert order(loader) == expected_order(20, 5)
    loader.set_epoch(9)
    assert order(loader) == expected_order(20, 9)


def test_a_users_distributed_sampler_is_kept_and_told():
    sampler = DistributedSampler(range(20), 2, 0, seed=6)
    loader = wrap(DataLoader(range(20), sampler=sampler), 2, 0)
    assert loader.sampler is sampler
    assert order(loader) == expected_order(20, 0, seed=6)
    assert order(loader) == expected_order(20, 1, seed=6)
    sampler.set_epoch(7)
    assert order(loader) == expected_order(20, 7, seed=6)


def test_a_batch_sampler_and_a_dataset_that_want_to_know_the_epoch():
    class Epochs(list):
        def set_epoch(self, epoch):
            self.epochs = [*getattr(self, "epochs", []), epoch]

    batches, dataset = Epochs([[0], [1]]), Epochs([1, 2])
    loader = wrap(DataLoader(dataset, batch_sampler=batches), 2, 1)
    assert values(loader) == values(loader) == [[2]]
    assert batches.epochs == dataset.epochs == [0, 1]


def test_a_user_who_holds_the_batch_sampler_that_was_dealt_is_heard():
    class Rolling(list):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([[self.epoch], [self.epoch]])

    batches = Rolling([[0], [0]])
    loader = wrap(DataLoader(range(20), batch_sampler=batches), 2, 0)
    assert order(loader) == [0]
    batches.set_epoch(6)
    assert order(loader) == [6]
    assert order(loader) == [7]
    loader.batch_sampler.set_epoch(2)
    assert order(loader) == [2]


def test_an_iteration_that_ends_early_counts():
    loader = wrap(DataLoader(range(20), shuffle=True), 2, 0, move=lambda batch: batch)
    next(iter(loader))
    assert order(loader) == expected_order(20, 1)


# -- workers ---------------------------------------------------------------------------------------


def drawn(first, *, replicas=2, seed=0, epochs=1, **options):
    torch.manual_seed(seed)
    loader = DataLoader(Draws(8), batch_size=1, num_workers=2, collate_fn=as_tuples, **options)
    loader = wrap(loader, replicas, first)
    return [[sample for batch in loader for sample in batch] for _ in range(epochs)]


def test_every_worker_of_every_replica_in_every_epoch_has_streams_of_its_own():
    samples = [s for first in (0, 1) for epoch in drawn(first, epochs=2) for s in epoch]
    assert len(samples) == 16
    assert {sample[0] for sample in samples} == {0, 1}
    for column in (1, 2, 3):
        assert len({sample[column] for sample in samples}) == 16
    # Two replicas, two workers, two epochs.
    assert len({sample[4] for sample in samples}) == 8


def test_the_streams_of_workers_follow_the_seed():
    assert drawn(1, seed=5) == drawn(1, seed=5)
    assert drawn(1, seed=5) != drawn(1, seed=6)


def test_one_replica_has_torchs_own_streams():
    torch.manual_seed(1)
    loader = DataLoader(Draws(), batch_size=1, num_workers=2, collate_fn=as_tuples)
    expected = list(loader)
    torch.manual_seed(1)
    assert list(wrap(loader)) == expected


def test_without_workers_nothing_is_seeded():
    original = DataLoader(Draws(4), collate_fn=as_tuples)
    loader = wrap(original, 2, 0)
    assert loader.worker_init_fn is None
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    loaded = [batch[0] for batch in loader]
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    torch.empty((), dtype=torch.int64).random_()  # as every loader does when it begins
    assert loaded == [Draws()[0], Draws()[1]]


@pytest.mark.parametrize(("method", "replicas"), [("fork", [0, 1]), ("spawn", [1])])
def test_a_worker_init_fn_of_the_users_runs_after_the_seeding(method, replicas):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    seeds = set()
    for first in replicas:
        torch.manual_seed(0)
        loader = DataLoader(
            Draws(4),
            num_workers=1,
            collate_fn=as_tuples,
            worker_init_fn=Recording(queue),
            multiprocessing_context=context,
        )
        (sample,) = next(iter(wrap(loader, 2, first)))
        worker, seed = queue.get(timeout=60)
        assert worker == 0
        assert seed == sample[4]
        seeds.add(seed)
    assert len(seeds) == len(replicas)


def test_persistent_workers_live_on_and_the_order_changes():
    original = DataLoader(range(20), shuffle=True, num_workers=1, persistent_workers=True)
    list(original)
    loader = wrap(original, 2, 0, move=lambda batch: batch)
    assert order(loader) == expected_order(20, 0)
    (worker,) = loader._iterator._workers
    assert order(loader) == expected_order(20, 1)
    assert loader._iterator._workers == [worker]
    # The original keeps its own.
    assert original._iterator is not loader._iterator
    assert sorted(order(original)) == list(range(20))


# -- moving ----------------------------------------------------------------------------------------


def test_batches_are_moved():
    loader = wrap(DataLoader(range(6), batch_size=2), 1, move=lambda batch: batch + 10)
    assert values(loader) == [[10, 11], [12, 13], [14, 15]]
    assert values(loader) == [[10, 11], [12, 13], [14, 15]]


def test_without_moving_iteration_is_the_loaders_own():
    loader = wrap(DataLoader(range(6), batch_size=2), 2, 0)
    assert type(iter(loader)) is type(iter(DataLoader(range(6))))


@pytest.mark.parametrize("move", [None, lambda batch: ("moved", batch)])
def test_the_boundary_comes_before_each_batch_is_fetched(move):
    happened = []

    class Telling(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            happened.append(index)
            return index

    loader = DataLoader(Telling(), batch_size=None)
    loader = wrap(loader, move=move, boundary=lambda: happened.append("boundary"))
    for batch in loader:
        happened.append("step")
        assert (batch if move is None else batch[1]) in (0, 1)
        assert move is None or batch[0] == "moved"
    once = ["boundary", 0, "step", "boundary", 1, "step", "boundary"]
    assert happened == once
    assert len(list(loader)) == 2


def test_errors_of_the_dataset_come_through():
    class Failing(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise KeyError(index)

    for move, boundary in ((None, None), (list, None), (list, list)):
        with pytest.raises(KeyError):
            list(wrap(DataLoader(Failing()), move=move, boundary=boundary))


def test_a_batch_sampler_built_by_the_user_is_sharded_in_the_loader():
    inner = BatchSampler(SequentialSampler(range(10)), batch_size=2, drop_last=True)
    loader = wrap(DataLoader(range(10), batch_sampler=inner), 2, 1)
    assert values(loader) == [[1, 3], [5, 7]]
    assert len(loader) == 2
    assert loader.batch_size is None
