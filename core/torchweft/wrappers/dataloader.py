"""The loader that ``fabric.setup_dataloaders`` returns: the user's own, sharded and moving."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from torchweft.api import DataShard
from torchweft.data.epoch import EpochCounter
from torchweft.data.sampler import shard_samplers
from torchweft.data.seeding import WorkerSeed
from torchweft.data.shard import ShardedDataset
from torchweft.errors import InvalidRequest, Misuse

__all__ = ["FabricDataLoader", "wrap_loader"]


def wrap_loader(
    loader: Any,
    *,
    shard: DataShard,
    move: Callable[[Any], Any] | None,
    boundary: Callable[[], None] | None,
    use_distributed_sampler: bool = True,
    seed: int = 0,
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
        seed: with the epoch, decides the order of shuffled data; the same on every rank. Where
            there are several replicas, a generator given to the loader or its sampler does not:
            it may be in another state on each rank.

    Raises:
        InvalidRequest: for what is not a loader, or a sampler that cannot be sharded.
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
    steps = 1
    if use_distributed_sampler:
        sampling: dict[str, Any] = {}
        if isinstance(loader.dataset, IterableDataset):
            steps = shard.count if loader.batch_sampler is not None else 1
            sampling = _shard_iterable(loader, shard, steps)
        else:
            sampling["sampler"], sampling["batch_sampler"] = shard_samplers(loader, shard, seed)
        loader = _replaced(loader, sampling)
    if shard.replicas > 1 and loader.num_workers > 0:
        seeding = WorkerSeed(shard.first, loader.worker_init_fn)
        loader = _replaced(loader, {"worker_init_fn": seeding})
    return FabricDataLoader(loader, move, boundary, steps)


class FabricDataLoader(DataLoader[Any]):
    """Yields the batches of the loader that it was made from, on the device.

    Every attribute is that loader's, those of its own class too, and setting one sets it there.
    Each iteration is an epoch: samplers and datasets that have ``set_epoch`` are told its number,
    0, 1, 2, …, unless the user sets it (``loader.sampler.set_epoch(n)``), from where the count
    goes on. A dataset in persistent workers is a copy, which torch gives no way to tell.
    """

    __loader: DataLoader[Any]
    __move: Callable[[Any], Any] | None
    __boundary: Callable[[], None] | None
    __per_step: int
    __epoch: EpochCounter

    # DataLoader's constructor is not called: all that it would set is looked up in the loader.
    def __init__(
        self,
        loader: DataLoader[Any],
        move: Callable[[Any], Any] | None,
        boundary: Callable[[], None] | None,
        per_step: int = 1,
    ) -> None:
        own = self.__dict__
        own["_FabricDataLoader__loader"] = loader
        own["_FabricDataLoader__move"] = move
        own["_FabricDataLoader__boundary"] = boundary
        own["_FabricDataLoader__per_step"] = per_step
        own["_FabricDataLoader__epoch"] = EpochCounter(
            loader.sampler, loader.batch_sampler, loader.dataset
        )

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the number of the next iteration, to go on after an interruption."""
        self.__epoch.set(epoch)

    def __iter__(self) -> Any:
        self.__epoch.start()
        batches = iter(self.__loader)
        if self.__boundary is not None:
            return _bounded(batches, self.__move, self.__boundary)
        return batches if self.__move is None else map(self.__move, batches)

    def __len__(self) -> int:
        length: int = len(self.__loader)
        if self.__per_step == 1:
            return length
        # torch counts the batches of an iterable dataset by batch_size, which is per replica.
        return length // self.__per_step if self.drop_last else -(-length // self.__per_step)

    # -- being the original ----------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_FabricDataLoader__loader"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__loader, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__loader, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.__loader)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__loader!r})"


def _bounded(
    batches: Iterator[Any], move: Callable[[Any], Any] | None, boundary: Callable[[], None]
) -> Iterator[Any]:
    boundary()
    for batch in batches:
        yield batch if move is None else move(batch)
        boundary()


def _shard_iterable(loader: DataLoader[Any], shard: DataShard, per_step: int) -> dict[str, Any]:
    """What changes about a loader of an iterable dataset."""
    dataset = loader.dataset
    if isinstance(dataset, ShardedDataset):
        # Before workers start: they get it with the dataset.
        dataset.shard = shard
    elif shard.replicas > 1 and shard.first == 0:
        warnings.warn(
            f"every rank will see the same samples of the iterable dataset "
            f"{type(dataset).__name__}, unless it divides them among the ranks by itself; "
            "torchweft.shard(dataset) divides them; use_distributed_sampler=False says that it is "
            "as you want it",
            UserWarning,
            stacklevel=4,
        )
    if per_step == 1:
        return {}
    batch_sampler: Any = loader.batch_sampler
    size = batch_sampler.batch_size * per_step
    return {"batch_sampler": BatchSampler(loader.sampler, size, batch_sampler.drop_last)}


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
