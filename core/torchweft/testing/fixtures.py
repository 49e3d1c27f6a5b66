"""The pytest plugin of the conformance kit: three fixtures. Loading it imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

__all__ = ["fresh_interpreter", "hook_recorder", "run_ranks"]

# An installed package's assertions are rewritten by themselves, those of an editable one are not.
pytest.register_assert_rewrite(
    *(f"torchweft.testing.{kind}" for kind in ("accelerator", "launcher", "plugin", "precision")),
    "torchweft.testing.strategy",
)


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """``run_ranks(n, function, *args, timeout=60, **arguments of Fabric)``: in real processes.

    ``function(fabric, *args)`` is called in every rank; returns what each of them returned.
    """
    from torchweft.testing import ranks

    return ranks.run_ranks


@pytest.fixture
def hook_recorder() -> Any:
    """``hook_recorder(*modules, **arguments of Fabric)``: a Fabric whose hook calls are recorded.

    ``modules`` are modules of hooks, beside those that are installed. ``hook_recorder.of()`` has
    the calls of a Fabric that could not be made too.
    """
    from torchweft.testing import recorder

    return recorder.HookRecorder()


@pytest.fixture(scope="session")
def fresh_interpreter() -> Callable[..., Any]:
    """``fresh_interpreter(code)``: run by a new interpreter; tells what was imported by then."""
    from torchweft.testing import interpreter

    return interpreter.fresh_interpreter


@pytest.fixture(scope="class")
def strategy_kit(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What the tests of one ``StrategyConformance`` share."""
    from torchweft.testing.strategy import StrategyKit

    kit = StrategyKit(request.cls)
    yield kit
    kit.close()
