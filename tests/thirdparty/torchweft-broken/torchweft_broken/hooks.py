"""Cannot be imported: the library that it drives was never installed."""

from __future__ import annotations

from broken_comm import shards

from torchweft.hookspecs import hookimpl
from torchweft.specs import StrategySpec


@hookimpl
def torchweft_strategies() -> list[StrategySpec]:
    """Never reached."""
    return [
        StrategySpec(name=f"shard_{number}", target="torchweft_broken.strategy:Shard")
        for number in shards()
    ]
