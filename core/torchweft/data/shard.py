"""Sharding of iterable datasets, which have no sampler that could do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from torchweft.api import DataShard
from torchweft.errors import InvalidRequest, Misuse

__all__ = ["MarkedCollate", "Repeated", "ShardedDataset", "shard"]


def shard(dataset: IterableDataset[Any]) -> ShardedDataset:
    """Make each data-parallel replica, and each worker of its loader, take every n-th sample.

    ::

        loader = DataLoader(torchweft.shard(dataset), batch_size=32, num_workers=2)
        loader = fabric.setup_dataloaders(loader)

    Every process and worker reads the whole dataset and keeps its part, so samples must come in
    the same order everywhere: a shuffle inside must be seeded by the dataset itself, not by the
    global generators, which differ between workers. Reading a sample should be cheap; what is
    expensive about it belongs into ``collate_fn``, or the dataset should divide its files itself.

    All replicas get equally many samples, so that none waits for another in vain: where the last
    round does not reach round, its samples are repeated. ``setup_dataloaders(duplicates=)`` leaves
    those out, or marks them.

    ``setup_dataloaders`` tells the dataset which replica it serves. Before that, or in a loader
    that is not set up, nothing is known of other processes: all samples are passed, divided among
    the loader's workers only. Attributes, ``set_epoch`` among them, are those of ``dataset``.

    Raises:
        InvalidRequest: for anything but an iterable dataset.
        Misuse: for a dataset that is sharded already.
    """
    if isinstance(dataset, ShardedDataset):
        raise Misuse("torchweft.shard() was given a dataset that it made; shard a dataset once")
    if not isinstance(dataset, IterableDataset):
        raise InvalidRequest(
            f"torchweft.shard() takes an IterableDataset, not a {type(dataset).__name__}; data "
            "that is read by index is sharded by fabric.setup_dataloaders(loader) as it is"
        )
    return _SizedShardedDataset(dataset) if hasattr(dataset, "__len__") else ShardedDataset(dataset)


class ShardedDataset(IterableDataset[Any]):
    """What ``torchweft.shard`` returns.

    Attributes:
        dataset: the whole dataset.
        shard: the replicas that this process feeds; set when the loader is set up.
        repeat: whether samples are repeated, so that all replicas get equally many.
        mark: whether those that are come as ``Repeated``.
    """

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset
        self.shard = DataShard()
        self.repeat = True
        self.mark = False

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        mine, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first, end = self.shard.first, self.shard.first + self.shard.count
        samples = iter(self.dataset)
        # A round gives one sample to each replica; the workers of a process take rounds in turn.
        # So the workers with the same number have equally many samples in every process.
        number = 0
        while round_ := list(islice(samples, self.shard.replicas)):
            if number % workers == mine:
                for replica in range(first, end):
                    if replica < len(round_):
                        yield round_[replica]
                    elif self.repeat:
                        sample = round_[replica % len(round_)]
                        yield Repeated(sample) if self.mark else sample
            number += 1

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _SizedShardedDataset(ShardedDataset):
    """One whose length is known, in samples of this process."""

    def __len__(self) -> int:
        samples: Any = self.dataset
        replicas, first, count = self.shard.replicas, self.shard.first, self.shard.count
        if self.repeat:
            return -(-len(samples) // replicas) * count
        return sum(len(range(r, len(samples), replicas)) for r in range(first, first + count))


@dataclass(frozen=True, slots=True)
class Repeated:
    """A sample that another replica has too."""

    sample: Any


class MarkedCollate:
    """A ``collate_fn`` that returns the batch and which of its samples were not ``Repeated``.

    Here rather than in the loader: the marks of what workers fetched come with the batch.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> tuple[Any, torch.Tensor]:
        """The batch, and a boolean tensor of shape ``(samples,)``."""
        real = [not isinstance(sample, Repeated) for sample in samples]
        plain = [s.sample if isinstance(s, Repeated) else s for s in samples]
        return self.collate(plain), torch.tensor(real)
