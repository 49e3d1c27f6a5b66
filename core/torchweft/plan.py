"""What was decided, and why. Plain data, free of torch, picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, Spec, StrategySpec

__all__ = ["Decision", "Rejected", "RunPlan", "Topology"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A spec that was looked at and not taken."""

    name: str
    provider: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How one kind was decided.

    Attributes:
        kind: ``"accelerator"``, ``"strategy"``, ``"precision"`` or ``"launcher"``.
        wanted: what was asked for, in the user's words.
        spec: what was taken.
        provider: the distribution that provides it.
        why: one clause.
        rejected: what was not taken, with reasons.
    """

    kind: str
    wanted: str
    spec: Spec
    provider: str
    why: str
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """How many processes on how many nodes, and on which devices of a node.

    Attributes:
        num_nodes: nodes; ``(least, most)`` when the run is elastic.
        processes_per_node: processes on each node.
        devices: indices of the devices used on each node.
    """

    num_nodes: int | tuple[int, int] = 1
    processes_per_node: int = 1
    devices: tuple[int, ...] = (0,)

    @property
    def max_nodes(self) -> int:
        """The largest number of nodes that may take part."""
        return self.num_nodes if isinstance(self.num_nodes, int) else self.num_nodes[1]

    @property
    def world_size(self) -> int:
        """Processes in all (the most that there may be when the run is elastic)."""
        return self.max_nodes * self.processes_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Everything that is settled before a process starts."""

    accelerator: AcceleratorSpec
    strategy: StrategySpec
    precision: PrecisionSpec
    launcher: LauncherSpec
    topology: Topology
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()

    def summary(self) -> str:
        """One line: ``"ddp on 2 x cpu, 32-true, launched by script"``."""
        nodes = self.topology.num_nodes
        where = "" if nodes == 1 else f" on {nodes} nodes"
        return (
            f"{self.strategy.name} on {len(self.topology.devices)} x {self.accelerator.name}"
            f"{where}, {self.precision.name}, launched by {self.launcher.name}"
        )

    def explain(self) -> str:
        """Every decision with its reason, and what was rejected, as text for a terminal."""
        lines = []
        for decision in self.decisions:
            lines.append(
                f"{decision.kind:<12}{decision.spec.name}  ({decision.provider}; "
                f"asked for: {decision.wanted}; {decision.why})"
            )
            lines.extend(
                f"{'':<12}  not {r.name} ({r.provider}): {r.reason}" for r in decision.rejected
            )
            options = self.options.get(decision.kind)
            if options:
                written = ", ".join(f"{key}={value!r}" for key, value in options.items())
                lines.append(f"{'':<12}  with {written}")
        top = self.topology
        lines.append(
            f"{'processes':<12}{top.world_size}  ({top.processes_per_node} on each of "
            f"{top.num_nodes} node(s), devices {', '.join(map(str, top.devices))})"
        )
        return "\n".join(lines)
