"""What cannot be asked of Ray: one clause for each objection to a plan. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchweft.api import RunPlan

__all__ = ["objections"]


def objections(plan: RunPlan) -> list[str]:
    """Why a plan with launcher ``ray`` cannot be carried out."""
    if plan.launcher.name != "ray":
        return []
    found = []
    topology = plan.topology
    if not isinstance(topology.num_nodes, int):
        least, most = topology.num_nodes
        found.append(
            f"launcher 'ray' places a fixed number of nodes, and num_nodes='{least}:{most}' lets "
            "them come and go; write one number"
        )
    count = len(topology.devices)
    if topology.devices != tuple(range(count)):
        found.append(
            f"devices={list(topology.devices)} picks single devices, and under launcher 'ray' it "
            f"is Ray that picks the devices of each node; write devices={count}"
        )
    return found
