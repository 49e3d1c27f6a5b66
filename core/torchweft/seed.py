"""One seed for every random stream that a training script draws from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from torchweft.errors import InvalidRequest

__all__ = ["Streams", "seed_everything", "seed_of_rank"]

_LARGEST = 2**32 - 1


def seed_everything(
    seed: int | None = None, workers: bool | None = None, verbose: bool = True
) -> int:
    """Seed Python's, NumPy's and torch's generators (all devices) and return the seed.

    ``seed``: 0 to 2**32 - 1; None is 0. The streams are the same in every rank; the workers of
    loaders that were set up get streams of their own. ``workers`` and ``verbose`` are accepted so
    that scripts written for Lightning Fabric run, and change nothing.

    Raises ``InvalidRequest`` for a seed that NumPy cannot take.
    """
    chosen = 0 if seed is None else seed
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen <= _LARGEST:
        raise InvalidRequest(f"seed={seed!r} is not a whole number from 0 to {_LARGEST}")
    random.seed(chosen)
    numpy.random.seed(chosen)
    torch.manual_seed(chosen)
    return chosen


def seed_of_rank(seed: int, rank: int) -> int:
    """A seed, 0 to 2**32 - 1, whose streams are independent of those of other ranks and seeds."""
    return int(numpy.random.SeedSequence((seed, rank)).generate_state(1)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Where the host's random streams stand: a fresh process goes on as a forked one does."""

    python: Any
    numpy: Any
    torch: Any

    @classmethod
    def capture(cls) -> Streams:
        """Those of this process."""
        return cls(
            python=random.getstate(),
            numpy=numpy.random.get_state(),
            torch=torch.get_rng_state().numpy(),
        )

    def restore(self) -> None:
        """Make them this process's."""
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(torch.from_numpy(self.torch))
