"""How a test class for a strategy may be written, and what is said where it is written wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conformance.mutants import Right
from torchweft import Fabric
from torchweft.api import Strategy
from torchweft.errors import RankFailed
from torchweft.testing import StrategyConformance, run_ranks
from torchweft.testing.strategy import StrategyKit


@pytest.fixture
def kit() -> Iterator[Callable[..., StrategyKit]]:
    """The kit of a class with some attributes."""
    made: list[StrategyKit] = []

    def make(**attributes: Any) -> StrategyKit:
        made.append(StrategyKit(type("TestMine", (StrategyConformance,), attributes)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def told(kit, **attributes) -> str:
    with pytest.raises(pytest.fail.Exception) as failed:
        kit(**attributes).fabric(1)
    return str(failed.value)


def test_a_class_that_names_nothing(kit):
    assert told(kit) == "TestMine names no strategy; write strategy = 'NAME' in it"


def test_an_attribute_that_is_misspelt(kit):
    assert told(kit, strategy="single_device", tolerence=0.1) == (
        "TestMine has an attribute 'tolerence', which StrategyConformance does not know; did you "
        "mean 'tolerance'? it knows accelerator, devices, environ, precision, strategy, timeout, "
        "tolerance"
    )


def test_an_attribute_of_the_author_s_own(kit):
    kit(strategy="single_device", note="of no concern").fabric(1)


def test_an_accelerator_that_is_not_here_skips_with_its_reason(kit):
    with pytest.raises(pytest.skip.Exception, match="accelerator 'mps' cannot be used here: "):
        kit(strategy="single_device", accelerator="mps").fabric(1)


@pytest.mark.parametrize("devices", [2, (2,), [2]])
def test_one_number_of_devices_is_a_number_too(kit, devices):
    assert kit(strategy=Right(), devices=devices).worlds() == (2,)


def test_a_strategy_of_one_process_is_tried_on_one_device(kit):
    assert kit(strategy="single_device").worlds() == (1,)


class Forgetful(Strategy):
    name = "forgetful"

    def start(self, place):
        """Without its base class's part."""


def nothing(fabric):
    return None


def test_a_start_that_leaves_out_its_base_class_is_named():
    with pytest.raises(RankFailed) as failed:
        run_ranks(1, nothing, strategy=Forgetful())
    assert (
        "BrokenPlugin: Forgetful.start() of strategy 'forgetful' did not set self.place; it must "
        "begin with super().start(place)"
    ) in str(failed.value)


class Waits(Right):
    def backward(self, loss, module, *args, **kwargs):
        if self.place.rank.rank == 0:
            self.collectives.barrier()


def test_ranks_that_hang_are_waited_for_twice_and_not_in_every_test(kit):
    mine = kit(strategy=Waits(), devices=2, timeout=1.0)
    case = next(iter(mine._together(2)))
    for words in ("after 1 s 2 of 2 ranks were not done", "not tried: ranks hung before"):
        with pytest.raises(BaseException, match=words):
            mine.check(2, case)


def report(fabric: Fabric) -> tuple[str, str]:
    return os.environ["HOW_MANY"], os.environ["OTHER"]


def test_a_variable_may_name_the_number_of_devices(kit: Callable[..., StrategyKit]) -> None:
    mine = kit(strategy="ddp", environ={"HOW_MANY": "{devices}", "OTHER": '{"a": 1}'})
    assert mine.run(2, report) == [("2", '{"a": 1}')] * 2
    assert "HOW_MANY" not in os.environ
