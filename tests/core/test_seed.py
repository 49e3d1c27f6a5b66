"""One seed for every stream."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from torchweft import Fabric, seed_everything
from torchweft.builtin.cpu import CPU
from torchweft.errors import InvalidRequest, Misuse
from torchweft.seed import Streams, seed_of_rank


def draw() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(1))


def test_every_stream_follows_the_seed() -> None:
    assert seed_everything(42) == 42
    first = draw()
    assert seed_everything(43) == 43
    other = draw()
    seed_everything(42)
    assert draw() == first
    assert not set(first) & set(other)


def test_no_seed_is_zero() -> None:
    assert seed_everything() == 0
    first = draw()
    assert seed_everything(0) == 0
    assert draw() == first


def test_what_scripts_for_other_libraries_pass_is_taken() -> None:
    assert seed_everything(7, workers=True, verbose=False) == 7


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "7", True])
def test_a_seed_that_cannot_be_used_is_an_error(seed: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"is not a whole number from 0 to 4294967295"):
        seed_everything(seed)


def test_the_largest_seed() -> None:
    assert seed_everything(2**32 - 1) == 2**32 - 1


def test_streams_go_on_where_they_stood() -> None:
    seed_everything(1)
    draw()
    streams = pickle.loads(pickle.dumps(Streams.capture()))
    expected = draw()
    seed_everything(2)
    streams.restore()
    assert draw() == expected


def test_a_fresh_process_is_given_the_streams_of_this_one() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(3)
    draw()
    sent = pickle.dumps(fabric)
    expected = draw()
    received = pickle.loads(sent)
    assert received._streams is not None
    received._streams.restore()
    assert draw() == expected
    assert fabric._streams is None


def test_the_seed_of_a_fabric_decides_the_order_of_its_loaders() -> None:
    orders = []
    for seed in (1, 1, 2):
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.seed_everything(seed)
        loader = fabric.setup_dataloaders(DataLoader(range(50), batch_size=50, shuffle=True))
        orders.append(next(iter(loader)).tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(50))


def test_called_on_the_class_it_is_the_function() -> None:
    assert Fabric.seed_everything(21) == 21
    first = draw()
    assert seed_everything(21, workers=True) == 21
    assert draw() == first


def test_streams_of_one_rank() -> None:
    fabric = Fabric(accelerator="cpu")
    assert fabric.seed_everything(5, per_rank=True) == 5
    first = draw()
    seed_everything(5)
    assert not set(draw()) & set(first)
    seed_everything(seed_of_rank(5, 0))
    assert draw() == first
    # Neither another rank nor another seed comes to the same.
    seeds = {seed_of_rank(seed, rank) for seed in range(50) for rank in range(50)}
    assert len(seeds) > 2490


def test_streams_by_rank_need_ranks() -> None:
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    with pytest.raises(Misuse, match=r"seed_everything\(per_rank=True\) came before fabric.launch"):
        fabric.seed_everything(5, per_rank=True)


class Seeded(CPU):
    """Says with what its generator begins."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def seed(self, seed: int) -> None:
        self.heard.append(seed)


def test_the_device_s_generator_is_told_once_there_is_one() -> None:
    accelerator = Seeded()
    fabric = Fabric(accelerator=accelerator, devices=1)
    fabric.seed_everything(3)
    # bind() takes what was seeded before from torch.
    assert accelerator.heard == []
    fabric.launch()
    fabric.seed_everything(4)
    fabric.seed_everything(5, per_rank=True)
    assert accelerator.heard == [4, seed_of_rank(5, 0)]
