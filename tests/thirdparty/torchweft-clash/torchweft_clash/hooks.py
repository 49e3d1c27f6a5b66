"""Declares a strategy under the name, and for the devices, of somebody else's."""

from __future__ import annotations

from torchweft.hookspecs import hookimpl
from torchweft.specs import StrategySpec


@hookimpl
def torchweft_strategies() -> list[StrategySpec]:
    """A second strategy called 'ddp'."""
    return [
        StrategySpec(
            name="ddp",
            target="torchweft_clash.strategy:Never",
            summary="another one",
            devices=("cuda", "cpu"),
        )
    ]
