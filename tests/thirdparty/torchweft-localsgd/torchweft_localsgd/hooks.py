"""What torchweft-localsgd declares."""

from __future__ import annotations

from torchweft.hookspecs import hookimpl
from torchweft.specs import StrategySpec


@hookimpl
def torchweft_strategies() -> list[StrategySpec]:
    """One strategy."""
    return [
        StrategySpec(
            name="localsgd",
            target="torchweft_localsgd.strategy:LocalSGD",
            summary="processes train by themselves, parameters averaged every few steps",
            devices=("cpu", "cuda"),
        )
    ]
