"""The loader that ``fabric.setup_dataloaders`` returns: the user's own, sharded and moving."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from torchweft.api import DataShard
from torchweft.data.epoch import EpochCounter
from torchweft.data.sampler import (
    DUPLICATES,
    Duplicates,
    MarkedBatches,
    no_batches_to_mark,
    shard_samplers,
)
from torchweft.data.seeding import WorkerSeed
from torchweft.data.shard import MarkedCollate, ShardedDataset
from torchweft.errors import InvalidRequest, Misuse, did_you_mean

__all__ = ["FabricDataLoader", "wrap_loader"]


def wrap_loader(
    loader: Any,
    *,
    shard: DataShard,
    move: Callable[[Any], Any] | None,
    boundary: Callable[[], None] | None,
    use_distributed_sampler: bool = True,
    duplicates: Duplicates = "keep",
    seed: int = 0,
    around: Callable[[Callable[[], Iterator[Any]]], Iterator[Any]] | None = None,
) -> FabricDataLoader:
    """Make a loader ready for one process of a run.

    The loader given stays as it is. Map-style data is dealt to the replicas (``shard_samplers``),
    iterable datasets pass as they are; ``loader.batch_size`` is per replica. Workers get random
    streams that differ between replicas. With one replica the loader is used as it is.

    Args:
        loader: a ``torch.utils.data.DataLoader`` or an instance of a subclass.
        shard: the replicas that this process feeds.
        move: brings a batch to the device; None leaves it where it was made.
        boundary: called before each batch is fetched, so also before the end is found.
        use_distributed_sampler: False leaves all sampling to the user.
        duplicates: what becomes of samples that are repeated so that all replicas get equally
            many: ``"keep"``; ``"drop"``, and a process may get a smaller batch at the end or one
            batch less; ``"mask"``, and the loader yields ``(batch, mask)``, the mask a boolean
            tensor of shape ``(samples in the batch,)`` that is false where a sample is repeated.
        seed: with the epoch, decides the order of shuffled data; the same on every rank. Where
            there are several replicas, a generator given to the loader or its sampler does not:
            it may be in another state on each rank.
        around: stands in for each iteration; it is given what starts one.

    Raises:
        InvalidRequest: for what is not a loader, a sampler that cannot be sharded, or duplicates
            that cannot be known.
        Misuse: for a loader that was set up before.
    """
    if isinstance(loader, FabricDataLoader):
        raise Misuse(
            "this loader was already set up; use what fabric.setup_dataloaders() returned, and "
            "set every loader up once"
        )
    if not isinstance(loader, DataLoader):
        raise InvalidRequest(
            f"fabric.setup_dataloaders() takes a torch.utils.data.DataLoader, not a "
            f"{type(loader).__name__}; put the data into one, or iterate over it as it is and "
            "bring each batch to the device with fabric.to_device(batch)"
        )
    _check_duplicates(duplicates, loader, use_distributed_sampler)
    steps = 1
    if use_distributed_sampler:
        sampling: dict[str, Any] = {}
        if isinstance(loader.dataset, IterableDataset):
            steps = shard.count if loader.batch_sampler is not None else 1
            sampling = _shard_iterable(loader, shard, steps, duplicates)
        else:
            sampling["sampler"], sampling["batch_sampler"] = shard_samplers(
                loader, shard, seed, duplicates
            )
        loader = _replaced(loader, sampling)
    if shard.replicas > 1 and loader.num_workers > 0:
        seeding = WorkerSeed(shard.first, loader.worker_init_fn)
        loader = _replaced(loader, {"worker_init_fn": seeding})
    return FabricDataLoader(loader, move, boundary, steps, around)


def _check_duplicates(
    duplicates: Any, loader: DataLoader[Any], use_distributed_sampler: bool
) -> None:
    if duplicates not in DUPLICATES:
        near = did_you_mean(str(duplicates), DUPLICATES) or ";"
        raise InvalidRequest(
            f"setup_dataloaders(duplicates={duplicates!r}){near} it is one of 'keep', 'drop' and "
            "'mask'"
        )
    if duplicates == "keep":
        return
    if not use_distributed_sampler:
        raise InvalidRequest(
            f"setup_dataloaders(duplicates='{duplicates}', use_distributed_sampler=False): samples "
            "are repeated by the sampling that was declined; leave one of the two out"
        )
    iterable = isinstance(loader.dataset, IterableDataset)
    in_order = loader.num_workers == 0 or getattr(loader, "in_order", True)
    if duplicates == "mask" and not iterable and not in_order:
        raise InvalidRequest(
            "duplicates='mask' needs the batches in the order in which they were drawn, and this "
            "loader has in_order=False; leave that out, or choose duplicates='drop'"
        )


class FabricDataLoader(DataLoader[Any]):
    """Yields the batches of the loader that it was made from, on the device.

    Every attribute is that loader's, those of its own class too, and setting one sets it there.
    Each iteration is an epoch: samplers and datasets that have ``set_epoch`` are told its number,
    0, 1, 2, …, unless the user sets it (``loader.sampler.set_epoch(n)``), from where the count
    goes on. A dataset in persistent workers is a copy, which torch gives no way to tell.

    A loader that has ``state_dict`` and ``load_state_dict``, as torchdata's ``StatefulDataLoader``,
    has them here, and the state holds the epoch too.
    """

    __loader: DataLoader[Any]
    __move: Callable[[Any], Any] | None
    __boundary: Callable[[], None] | None
    __per_step: int
    __around: Callable[[Callable[[], Iterator[Any]]], Iterator[Any]] | None
    __epoch: EpochCounter
    __marked: MarkedBatches | None
    __has_state: bool

    # DataLoader's constructor is not called: all that it would set is looked up in the loader.
    def __init__(
        self,
        loader: DataLoader[Any],
        move: Callable[[Any], Any] | None,
        boundary: Callable[[], None] | None,
        per_step: int = 1,
        around: Callable[[Callable[[], Iterator[Any]]], Iterator[Any]] | None = None,
    ) -> None:
        own = self.__dict__
        own["_FabricDataLoader__loader"] = loader
        own["_FabricDataLoader__move"] = move
        own["_FabricDataLoader__boundary"] = boundary
        own["_FabricDataLoader__per_step"] = per_step
        own["_FabricDataLoader__around"] = around
        own["_FabricDataLoader__epoch"] = EpochCounter(
            loader.sampler, loader.batch_sampler, loader.dataset
        )
        drawn: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        own["_FabricDataLoader__marked"] = drawn if isinstance(drawn, MarkedBatches) else None
        own["_FabricDataLoader__has_state"] = callable(getattr(loader, "state_dict", None))

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the number of the next iteration, to go on after an interruption."""
        self.__epoch.set(epoch)

    def __iter__(self) -> Any:
        return self.__start() if self.__around is None else self.__around(self.__start)

    def __start(self) -> Iterator[Any]:
        self.__epoch.start()
        batches: Iterator[Any]
        if self.__marked is None:
            batches = iter(self.__loader)
        else:
            # Before the loader draws: with workers it does so ahead of the loop.
            marks = self.__marked.marks = deque()
            batches = map(partial(_with_mask, marks), iter(self.__loader))
        if self.__has_state:
            batches = self.__to_the_end(batches)
        if self.__boundary is not None:
            return _bounded(batches, self.__move, self.__boundary)
        return batches if self.__move is None else map(self.__move, batches)

    def __to_the_end(self, batches: Iterator[Any]) -> Iterator[Any]:
        yield from batches
        self.__epoch.end()

    def __len__(self) -> int:
        length: int = len(self.__loader)
        if self.__per_step == 1:
            return length
        # torch counts the batches of an iterable dataset by batch_size, which is per replica.
        return length // self.__per_step if self.drop_last else -(-length // self.__per_step)

    # -- being the original ----------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        value = getattr(object.__getattribute__(self, "_FabricDataLoader__loader"), name)
        if name == "state_dict":
            return partial(self.__save_state, value)
        if name == "load_state_dict":
            return partial(self.__load_state, value)
        return value

    def __save_state(self, inner: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self.__check_can_resume()
        if self.__epoch.idle:
            # A loader that was not begun may begin in order to say where it stands.
            self.__epoch.set(self.__epoch.current)
        return {**inner(), _EPOCH: self.__epoch.current}

    def __load_state(self, inner: Callable[[Any], Any], state: dict[str, Any]) -> None:
        self.__check_can_resume()
        # One that was saved without torchweft says nothing of an epoch.
        if _EPOCH in state:
            self.__epoch.set(state[_EPOCH])
        inner({key: value for key, value in state.items() if key != _EPOCH})

    def __check_can_resume(self) -> None:
        if self.__marked is not None:
            raise Misuse(
                "a loader that was set up with duplicates='mask' cannot be resumed in the middle "
                "of an epoch; leave it out of the state, an evaluation begins anew"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__loader, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__loader, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.__loader)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__loader!r})"


#: Where the state of a loader holds the epoch to go on with.
_EPOCH = "torchweft_epoch"


def _with_mask(marks: deque[list[bool]], batch: Any) -> tuple[Any, Tensor]:
    if not marks:
        raise Misuse(
            "duplicates='mask': the loader yields more batches than its sampler has drawn, so that "
            "nothing is known of their samples; choose duplicates='drop'"
        )
    return batch, torch.tensor(marks.popleft())


def _bounded(
    batches: Iterator[Any], move: Callable[[Any], Any] | None, boundary: Callable[[], None]
) -> Iterator[Any]:
    boundary()
    for batch in batches:
        yield batch if move is None else move(batch)
        boundary()


def _shard_iterable(
    loader: DataLoader[Any], shard: DataShard, per_step: int, duplicates: Duplicates
) -> dict[str, Any]:
    """What changes about a loader of an iterable dataset."""
    dataset = loader.dataset
    if isinstance(dataset, ShardedDataset):
        # Before workers start: they get it with the dataset.
        dataset.shard = shard
        dataset.repeat, dataset.mark = duplicates != "drop", duplicates == "mask"
    elif shard.replicas > 1 and duplicates != "keep":
        raise InvalidRequest(
            f"duplicates='{duplicates}': every rank sees all samples of the iterable dataset "
            f"{type(dataset).__name__}; divide them first, with torchweft.shard(dataset)"
        )
    elif shard.replicas > 1 and shard.first == 0:
        warnings.warn(
            f"every rank will see the same samples of the iterable dataset "
            f"{type(dataset).__name__}, unless it divides them among the ranks by itself; "
            "torchweft.shard(dataset) divides them; use_distributed_sampler=False says that it is "
            "as you want it",
            UserWarning,
            stacklevel=4,
        )
    changed: dict[str, Any] = {}
    if duplicates == "mask":
        if loader.batch_sampler is None:
            raise no_batches_to_mark()
        changed["collate_fn"] = MarkedCollate(loader.collate_fn)
    if per_step > 1:
        batch_sampler: Any = loader.batch_sampler
        size = batch_sampler.batch_size * per_step
        changed["batch_sampler"] = BatchSampler(loader.sampler, size, batch_sampler.drop_last)
    return changed


def _replaced(loader: DataLoader[Any], attributes: dict[str, Any]) -> DataLoader[Any]:
    """A copy of the loader with other attributes; itself, where they are not other."""
    if all(getattr(loader, name) is value for name, value in attributes.items()):
        return loader
    # Not made by the class again: a subclass may take any arguments.
    new = copy.copy(loader)
    # A loader that was iterated before keeps its persistent workers to itself.
    attributes = {**attributes, "_iterator": None}
    for name, value in attributes.items():
        # DataLoader refuses to have these set.
        object.__setattr__(new, name, value)
    return new
