"""What torchweft-acme declares."""

from __future__ import annotations

from torchweft.hookspecs import hookimpl
from torchweft.specs import Preset, StrategySpec


@hookimpl
def torchweft_strategies() -> list[StrategySpec]:
    """One strategy, and a name for it with an option."""
    return [
        StrategySpec(
            name="acme",
            target="torchweft_acme.strategy:AcmeStrategy",
            summary="gradients averaged by hand",
            devices=("cpu",),
            presets=(Preset(alias="acme_compressed", options={"compress": True}),),
        )
    ]
