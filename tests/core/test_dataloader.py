"""The loader that ``setup_dataloaders`` returns."""

from __future__ import annotations

import collections
import contextlib
import copy
import multiprocessing
import pickle
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
from torchdata.stateful_dataloader import StatefulDataLoader

from torchweft import Fabric
from torchweft.api import DataShard
from torchweft.data.shard import shard
from torchweft.errors import InvalidRequest, Misuse
from torchweft.wrappers.dataloader import FabricDataLoader, wrap_loader

# torchdata calls a function of torch's that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


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


# -- without duplicates ----------------------------------------------------------------------------


def evaluate(make, replicas=2, **options):
    """What each rank sees, batch by batch: values, and the mask where there is one."""
    seen = []
    for first in range(replicas):
        loader = wrap(make(), replicas, first, **options)
        rank = [
            (batch[0].tolist(), batch[1].tolist())
            if options["duplicates"] == "mask"
            else batch.tolist()
            for batch in loader
        ]
        assert len(loader) == len(rank)
        seen.append(rank)
    return seen


def test_every_sample_once():
    def make():
        return DataLoader(range(9), batch_size=2)

    assert evaluate(make, duplicates="drop") == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7]]]
    assert evaluate(make, duplicates="keep") == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], [0]]]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_mask_comes_with_every_batch(workers, persistent):
    loader = DataLoader(range(9), batch_size=2, num_workers=workers, persistent_workers=persistent)
    loader = wrap(loader, 2, 1, duplicates="mask")
    for _ in range(2):
        got = [(batch.tolist(), mask.tolist()) for batch, mask in loader]
        assert got == [([1, 3], [True, True]), ([5, 7], [True, True]), ([0], [False])]
        # One that is left in the middle does not disturb the next.
        next(iter(loader))


def test_masks_of_batches_that_are_dealt_whole():
    batches = [[0, 1, 2], [3], [4, 5]]
    seen = evaluate(lambda: DataLoader(range(6), batch_sampler=batches), duplicates="mask")
    assert seen == [
        [([0, 1, 2], [True] * 3), ([4, 5], [True] * 2)],
        [([3], [True]), ([0, 1, 2], [False] * 3)],
    ]
    seen = evaluate(lambda: DataLoader(range(6), batch_sampler=batches), duplicates="drop")
    assert seen == [[[0, 1, 2], [4, 5]], [[3]]]


def test_one_replica_has_masks_too():
    for make in (
        lambda: DataLoader(range(3), batch_size=2),
        lambda: DataLoader(range(3), batch_sampler=[[0, 1], [2]]),
        lambda: DataLoader(shard(SizedNumbers(3)), batch_size=2),
        lambda: DataLoader(Numbers(3), batch_size=2),
    ):
        loader = wrap(make(), duplicates="mask")
        got = [(batch.tolist(), mask.tolist()) for batch, mask in loader]
        assert got == [([0, 1], [True, True]), ([2], [True])]


def test_the_mask_is_moved_with_the_batch():
    loader = wrap(DataLoader(range(3), batch_size=4), 2, 1, duplicates="mask", move=list)
    ((batch, mask),) = loader
    assert batch.tolist() == [1, 0]
    assert mask.dtype is torch.bool
    assert mask.tolist() == [True, False]


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_datasets_without_duplicates(workers):
    def make():
        return DataLoader(shard(Numbers(11)), batch_size=2, num_workers=workers)

    def whole(rank):
        return sorted(index for batch in rank for index in batch)

    dropped = [
        [batch.tolist() for batch in wrap(make(), 3, first, duplicates="drop")]
        for first in range(3)
    ]
    assert list(map(whole, dropped)) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    masked = [list(wrap(make(), 3, first, duplicates="mask")) for first in range(3)]
    assert len({len(rank) for rank in masked}) == 1
    real = [[batch[mask].tolist() for batch, mask in rank] for rank in masked]
    assert list(map(whole, real)) == list(map(whole, dropped))
    assert sum(mask.numel() for rank in masked for _, mask in rank) == 12


def test_what_cannot_be_without_duplicates():
    def refused(loader, message, **options):
        with pytest.raises(InvalidRequest, match=message):
            wrap(loader, 2, 0, **options)

    refused(
        DataLoader(range(4)),
        r"setup_dataloaders\(duplicates='masked'\); did you mean 'mask'\? it is one of 'keep', "
        "'drop' and 'mask'",
        duplicates="masked",
    )
    refused(
        DataLoader(range(4)),
        r"setup_dataloaders\(duplicates=None\); it is one of 'keep', 'drop' and 'mask'",
        duplicates=None,
    )
    refused(
        DataLoader(range(4)),
        r"setup_dataloaders\(duplicates='drop', use_distributed_sampler=False\): samples are "
        "repeated by the sampling that was declined; leave one of the two out",
        duplicates="drop",
        use_distributed_sampler=False,
    )
    refused(
        DataLoader(Numbers(4)),
        "duplicates='drop': every rank sees all samples of the iterable dataset Numbers; divide "
        r"them first, with torchweft.shard\(dataset\)",
        duplicates="drop",
    )
    refused(
        DataLoader(range(4), num_workers=1, in_order=False),
        "duplicates='mask' needs the batches in the order in which they were drawn, and this "
        "loader has in_order=False; leave that out, or choose duplicates='drop'",
        duplicates="mask",
    )
    refused(
        DataLoader(shard(Numbers(4)), batch_size=None),
        "duplicates='mask' marks the samples of a batch, and a loader with batch_size=None has no",
        duplicates="mask",
    )


def test_a_loader_that_yields_more_than_its_sampler_drew():
    class Twice(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                yield batch

    loader = wrap(Twice(range(2)), 2, 0, duplicates="mask")
    message = (
        "duplicates='mask': the loader yields more batches than its sampler has drawn, so that "
        "nothing is known of their samples; choose duplicates='drop'"
    )
    with pytest.raises(Misuse, match=message):
        list(loader)


# -- loaders with a state --------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_a_stateful_loader_goes_on_where_it_was(workers, first):
    def make():
        # A generator of its own, since the processes' own are not alike.
        loader = StatefulDataLoader(range(21), 2, shuffle=True, num_workers=workers)
        return wrap(loader, 2, first, move=lambda batch: batch)

    loader = make()
    list(loader)
    under_way = iter(loader)
    done = [next(under_way).tolist() for _ in range(3)]
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    rest = [batch.tolist() for batch in under_way]
    following = values(loader)
    assert len(done) + len(rest) == len(following) == 6

    resumed = make()
    resumed.load_state_dict(state)
    assert values(resumed) == rest
    assert values(resumed) == following


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_stateful_loader_between_epochs(epochs):
    def make():
        return wrap(StatefulDataLoader(range(21), 2, shuffle=True), 2, 0)

    loader = make()
    for _ in range(epochs):
        list(loader)
    state = loader.state_dict()
    assert state["torchweft_epoch"] == epochs
    resumed = make()
    resumed.load_state_dict(state)
    expected = [values(loader), values(loader)]
    assert [values(resumed), values(resumed)] == expected
    assert expected[0] != expected[1]


def test_replicas_of_a_stateful_loader_share_the_samples_evenly():
    loaders = [
        wrap(StatefulDataLoader(range(7), 2, shuffle=shuffle), 2, first)
        for shuffle in (False, True)
        for first in (0, 1)
    ]
    assert [values(loader) for loader in loaders[:2]] == [[[0, 2], [4, 6]], [[1, 3], [5, 0]]]
    assert [loader.batch_size for loader in loaders] == [2] * 4
    shuffled = [index for loader in loaders[2:] for batch in values(loader) for index in batch]
    assert set(shuffled) == set(range(7))
    assert len(shuffled) == 8


def test_a_stateful_loader_of_an_iterable_dataset():
    def make():
        return wrap(StatefulDataLoader(shard(Numbers(21)), 2), 2, 1)

    loader = make()
    under_way = iter(loader)
    next(under_way)
    state = loader.state_dict()
    rest = [batch.tolist() for batch in under_way]
    resumed = make()
    resumed.load_state_dict(state)
    assert values(resumed) == rest
    assert rest[0] == [5, 7]


def test_a_state_from_elsewhere_says_nothing_of_an_epoch():
    plain = StatefulDataLoader(range(8), 2)
    next(iter(plain))
    loader = wrap(StatefulDataLoader(range(8), 2))
    loader.set_epoch(4)
    loader.load_state_dict(plain.state_dict())
    assert values(loader) == [[2, 3], [4, 5], [6, 7]]


def test_only_a_loader_with_a_state_has_one():
    loader = wrap(DataLoader(range(4)), 2, 0)
    assert not hasattr(loader, "state_dict")
    assert not hasattr(loader, "load_state_dict")


def test_masked_batches_cannot_be_resumed():
    loader = wrap(StatefulDataLoader(range(5), 2), 2, 0, duplicates="mask")
    message = (
        "a loader that was set up with duplicates='mask' cannot be resumed in the middle of an "
        "epoch; leave it out of the state, an evaluation begins anew"
    )
    for call in (loader.state_dict, lambda: loader.load_state_dict({})):
        with pytest.raises(Misuse, match=message):
            call()
    assert [(batch.tolist(), mask.tolist()) for batch, mask in loader] == [
        ([0, 2], [True, True]),
        ([4], [True]),
    ]


# -- nothing is patched ----------------------------------------------------------------------------


def test_torchs_classes_stay_as_they_are():
    classes = (DataLoader, DistributedSampler, BatchSampler, IterableDataset)
    before = [dict(vars(cls)) for cls in classes]

    class Failing(DataLoader):
        def __iter__(self):
            raise KeyError

    for loader in (DataLoader(range(4)), Failing(range(4)), DataLoader(range(4), sampler=iter(()))):
        with contextlib.suppress(KeyError, InvalidRequest):
            next(iter(wrap(loader, 2, 0, duplicates="mask")))
    assert [dict(vars(cls)) for cls in classes] == before


def test_it_can_be_copied():
    loader = wrap(DataLoader(range(6), batch_size=2, shuffle=True), 2, 0)
    copied = copy.deepcopy(loader)
    assert values(copied) == values(loader)
    assert values(copied) == values(loader)
    assert pickle.loads(pickle.dumps(loader)).batch_size == 2


def test_batches_of_named_collections_keep_their_class():
    Sample = collections.namedtuple("Sample", ["image", "label"])
    loader = wrap(DataLoader([Sample(1, 2), Sample(3, 4), Sample(5, 6)], batch_size=2), 2, 0)
    (batch,) = loader
    assert type(batch) is Sample
    assert batch.image.tolist() == [1, 5]


def test_the_older_name_of_an_argument_is_taken() -> None:
    fabric = Fabric(accelerator="cpu")
    loader = DataLoader(range(4))
    with pytest.raises(InvalidRequest, match="use_distributed_sampler=False"):
        fabric.setup_dataloaders(loader, replace_sampler=False, duplicates="drop")
    assert len(fabric.setup_dataloaders(loader, replace_sampler=True)) == 4
