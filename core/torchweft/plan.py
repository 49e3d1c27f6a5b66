"""What was decided, and why. Plain data, free of torch, picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, Spec, StrategySpec

__all__ = ["Decision", "Rejected", "RunPlan", "Topology"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A spec that was looked at and not taken.

    Attributes:
        name: of the spec.
        provider: the distribution that provides it.
        reason: why it cannot be used, or not with what was decided before.
        hint: what to do about it; may be empty.
    """

    name: str
    provider: str
    reason: str
    hint: str = ""

    def sentence(self) -> str:
        """``"'name' (provider): reason; hint"``."""
        hint = f"; {self.hint}" if self.hint else ""
        return f"'{self.name}' ({self.provider}): {self.reason}{hint}"


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
    """Everything that is settled before a process starts.

    Attributes:
        accelerator: the kind of device.
        strategy: how work is spread.
        precision: which number formats.
        launcher: who makes the processes.
        topology: how many processes, where.
        options: by kind, what the constructor of the chosen class is given.
        decisions: how each of the four was decided, in this order.
        notes: what else the user should know, one sentence each.
    """

    accelerator: AcceleratorSpec
    strategy: StrategySpec
    precision: PrecisionSpec
    launcher: LauncherSpec
    topology: Topology
    # Mappings have no hash; what was chosen tells plans apart well enough.
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    decisions: tuple[Decision, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line: ``"ddp on 2 x cpu, 32-true, launched by script"``."""
        where = f"{len(self.topology.devices)} x {self.accelerator.name}"
        if self.topology.num_nodes != 1:
            where += f" on each of {self._nodes()} nodes"
        return (
            f"{self.strategy.name} on {where}, {self.precision.name}, "
            f"launched by {self.launcher.name}"
        )

    def explain(self) -> str:
        """Every decision with its reason, and what was rejected, as text for a terminal.

        A label of at most 12 characters begins a line; lines without one continue the entry.
        """
        rows: list[tuple[str, str]] = []
        for decision in self.decisions:
            rows.append((decision.kind, _decided(decision)))
            options = self.options.get(decision.kind)
            if options:
                written = ", ".join(f"{key}={value!r}" for key, value in options.items())
                rows.append(("", f"  with {written}"))
            rows.extend(("", f"  not {rejected.sentence()}") for rejected in decision.rejected)
        rows.append(("processes", self._processes()))
        rows.extend(("note", note) for note in self.notes)
        return "\n".join(f"{label:<12}{text}" for label, text in rows)

    def _nodes(self) -> str:
        nodes = self.topology.num_nodes
        return f"{nodes}" if isinstance(nodes, int) else f"{nodes[0]} to {nodes[1]}"

    def _processes(self) -> str:
        top = self.topology
        devices = _indices(top.devices)
        node = "this node" if top.num_nodes == 1 else f"each of {self._nodes()} nodes"
        most = "" if isinstance(top.num_nodes, int) else "at most "
        return f"{most}{top.world_size}  ({top.processes_per_node} on {node}, devices {devices})"


def _indices(devices: tuple[int, ...]) -> str:
    first, last = min(devices), max(devices)
    if len(devices) > 8 and devices == tuple(range(first, last + 1)):
        return f"{first} to {last}"
    return ", ".join(map(str, devices))


def _decided(decision: Decision) -> str:
    return (
        f"{decision.spec.name}  ({decision.provider}; asked for: {decision.wanted}; {decision.why})"
    )
