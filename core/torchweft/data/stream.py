"""One random stream for all ranks, for as long as a sampler draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch.utils.data import Sampler

__all__ = ["same_stream"]


@contextmanager
def same_stream(seed: int, sampler: Any) -> Iterator[None]:
    """Seed every stream that ``sampler`` may draw from, and put all of them back afterwards.

    These are torch's generator for the CPU, Python's and NumPy's, and the generators that the
    sampler, or a sampler inside it, holds as attributes (``torch.Generator``, ``random.Random``,
    NumPy's both kinds): a generator of the user's may be in another state in every process, and
    processes that draw different orders would train on some samples twice and on others never.
    Outside of the block nothing changes, so that a draw leaves no trace in the user's streams.
    """
    with ExitStack() as stack:
        for restore, reseed in _streams(sampler):
            stack.callback(restore)
            reseed(seed)
        yield


_Stream = tuple[Callable[[], Any], Callable[[int], Any]]


def _streams(sampler: Any) -> Iterator[_Stream]:
    # Not torch.manual_seed: that reseeds every device too.
    yield _of_torch(torch.default_generator)
    python = random.getstate()
    yield lambda: random.setstate(python), random.seed
    legacy = numpy.random.get_state()
    yield lambda: numpy.random.set_state(legacy), _seed_numpy
    for held in _held_by(sampler, set()):
        if isinstance(held, torch.Generator):
            yield _of_torch(held)
        elif isinstance(held, random.Random):
            yield _of_python(held)
        elif isinstance(held, numpy.random.Generator):
            yield _of_numpy(held.bit_generator)
        elif isinstance(held, numpy.random.RandomState):
            yield _of_random_state(held)


def _held_by(sampler: Any, seen: set[int]) -> Iterator[Any]:
    if id(sampler) in seen:
        return
    seen.add(id(sampler))
    for name, value in list(getattr(sampler, "__dict__", {}).items()):
        if isinstance(value, Sampler) or name == "sampler":
            yield from _held_by(value, seen)
        else:
            yield value


def _of_torch(generator: torch.Generator) -> _Stream:
    state = generator.get_state()
    return lambda: generator.set_state(state), generator.manual_seed


def _of_python(generator: random.Random) -> _Stream:
    state = generator.getstate()
    return lambda: generator.setstate(state), generator.seed


def _of_random_state(generator: numpy.random.RandomState) -> _Stream:
    state = generator.get_state()
    return lambda: generator.set_state(state), lambda seed: generator.seed(seed % 2**32)


def _of_numpy(bits: Any) -> _Stream:
    state = bits.state

    def reseed(seed: int) -> None:
        bits.state = type(bits)(seed).state

    def restore() -> None:
        bits.state = state

    return restore, reseed


def _seed_numpy(seed: int) -> None:
    numpy.random.seed(seed % 2**32)
