"""What a plan may ask of XLA, found out without importing it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torchweft_xla.probe import xla

if TYPE_CHECKING:
    from torchweft.api import RunPlan

__all__ = ["objections"]


def objections(plan: RunPlan) -> list[str]:
    """One sentence for devices that are neither one nor all."""
    if plan.accelerator.target != "torchweft_xla.accelerator:XLA":
        return []
    if plan.strategy.processes == "device":
        # A process for each, of which there may be any number; XLA says which there can be.
        return []
    count, asked = xla().count, plan.topology.devices
    if count is None or len(asked) in (1, count):
        return []
    more = ""
    if os.environ.get("PJRT_DEVICE") == "CPU":
        more = f"; with PJRT_DEVICE=CPU, CPU_NUM_DEVICES={len(asked)} makes as many as you like"
    sentence = (
        f"{len(asked)} of the {count} XLA devices of this host were asked for, and one process "
        f"drives all of them or one: leave devices out for all {count}, or write devices=1, or "
        f"one by its index, as devices=[{asked[-1]}]{more}"
    )
    return [sentence]
