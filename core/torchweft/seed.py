"""One seed for every random stream that a training script draws from."""

from __future__ import annotations

import os
import random

import numpy
import torch

from torchweft.errors import InvalidRequest

__all__ = ["SEED_VARIABLE", "seed_everything"]

#: Read when no seed is given, and set, so that programs that a rank starts use the same seed.
SEED_VARIABLE = "TORCHWEFT_SEED"

_LARGEST = 2**32 - 1


def seed_everything(seed: int | None = None) -> int:
    """Seed Python's, NumPy's and torch's generators (all devices) and return the seed.

    ``seed``: 0 to 2**32 - 1; None takes the environment variable ``TORCHWEFT_SEED``, or 0. The
    streams are the same in every rank; a loader's workers get streams of their own.
    """
    if seed is None:
        text = os.environ.get(SEED_VARIABLE, "0")
        if not text.isdigit():
            raise InvalidRequest(
                f"the environment variable {SEED_VARIABLE} is '{text}'; it takes a whole number "
                f"from 0 to {_LARGEST}"
            )
        seed = int(text)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _LARGEST:
        raise InvalidRequest(f"seed={seed!r} is not a whole number from 0 to {_LARGEST}")
    os.environ[SEED_VARIABLE] = str(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    return seed
