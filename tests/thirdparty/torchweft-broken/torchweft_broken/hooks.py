"""Cannot be imported: the library that it drives was never installed."""

import broken_comm

from torchweft.hookspecs import hookimpl
from torchweft.specs import StrategySpec


@hookimpl
def torchweft_strategies() -> list[StrategySpec]:
    """Never reached."""
    return [StrategySpec(name="shard_all", target="torchweft_broken.strategy:ShardAll")]
