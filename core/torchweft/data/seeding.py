"""Random streams of a loader's workers: another one for each worker of each replica."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch

__all__ = ["WorkerSeed"]


class WorkerSeed:
    """A ``worker_init_fn`` that mixes the replica into a worker's seed, then calls the user's own.

    torch seeds worker ``w`` with a number drawn in the main process, plus ``w``. After
    ``seed_everything`` that number is the same on every rank, and so would be the augmentations.
    ``torch.initial_seed()`` in the worker is the mixed seed, as recipes for other libraries
    expect; ``get_worker_info().seed`` stays torch's.
    """

    def __init__(self, replica: int, then: Callable[[int], Any] | None) -> None:
        self.replica = replica
        self.then = then

    def __call__(self, worker_id: int) -> None:
        """Called by torch in the worker, after its own seeding and before data is loaded."""
        seeds = numpy.random.SeedSequence([torch.initial_seed(), self.replica])
        # An own stream for each library: numbers drawn from one say nothing about the others.
        for_numpy, for_python, for_torch = seeds.spawn(3)
        numpy.random.seed(for_numpy.generate_state(4))
        random.seed(int(for_python.generate_state(1, numpy.uint64)[0]))
        # torch.initial_seed() gives it back, where a negative number would be in the way.
        torch.manual_seed(int(for_torch.generate_state(1, numpy.uint64)[0] >> numpy.uint64(1)))
        if self.then is not None:
            self.then(worker_id)
