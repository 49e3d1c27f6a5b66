"""How many processes on how many nodes, from what was asked for, what is there, and what runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchweft.errors import InvalidRequest, NotAvailable
from torchweft.plan import Topology
from torchweft.request import Devices, RunRequest
from torchweft.specs import AcceleratorSpec, Detection, StrategySpec

__all__ = ["Site"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What is known before a strategy is chosen.

    Attributes:
        request: for its ``devices``, ``num_nodes`` and ``strategy``.
        accelerator: that was chosen.
        count: its devices on this node; None where there is no limit.
        detection: of a launcher that has already made this process.
    """

    request: RunRequest
    accelerator: AcceleratorSpec
    count: int | None
    detection: Detection | None = None

    def topology(self, strategy: StrategySpec, *, named: bool) -> Topology:
        """What there would be under a strategy; ``named``: it was not left to ``"auto"``.

        Raises ``InvalidRequest`` or ``NotAvailable`` where what was asked for contradicts itself,
        the launcher, or what is there.
        """
        devices = self._devices(strategy, named)
        processes = len(devices) if strategy.processes == "device" else 1
        return Topology(
            num_nodes=self._nodes(processes), processes_per_node=processes, devices=devices
        )

    def check_started(self, topology: Topology, strategy: StrategySpec) -> None:
        """Raise ``InvalidRequest`` unless the launcher made as many processes as are needed."""
        started = self.detection and self.detection.processes_per_node
        if not self.detection or started in (None, topology.processes_per_node):
            return
        needs = f"strategy '{strategy.name}'"
        if self.request.devices is not None:
            needs = f"{_spell(self.request.devices)} with {needs}"
        raise InvalidRequest(
            f"{needs} needs {topology.processes_per_node} process(es) per node, but "
            f"{self.detection.reason} with {started} per node; "
            f"{_way_out(self.detection.processes_hint, topology.processes_per_node)}, or leave "
            "devices out"
        )

    # -- devices -------------------------------------------------------------------------------

    def _devices(self, strategy: StrategySpec, named: bool) -> tuple[int, ...]:
        asked = self.request.devices
        if isinstance(asked, tuple):
            return self._chosen(asked)
        wanted = self._default(strategy, named) if asked is None else asked
        if wanted == "all":
            return tuple(range(self._all()))
        if self.count is not None and wanted > self.count:
            raise NotAvailable(
                f"{self._why(wanted)}, but accelerator '{self.accelerator.name}' has "
                f"{self._there()} here{self._more_devices(wanted)}"
            )
        return tuple(range(wanted))

    def _default(self, strategy: StrategySpec, named: bool) -> int | Literal["all"]:
        # Who asks for a strategy of one device, and for no number, asks for one.
        if named and strategy.processes == "one":
            return 1
        if strategy.processes != "node" and self.detection and self.detection.processes_per_node:
            return self.detection.processes_per_node
        return self.accelerator.default_devices

    def _chosen(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        name = self.accelerator.name
        if not self.accelerator.selectable:
            raise InvalidRequest(
                f"{_spell(asked)} picks single devices, which accelerator '{name}' does not "
                f"have; write devices={len(asked)}"
            )
        missing = [index for index in asked if self.count is not None and index >= self.count]
        if missing:
            raise NotAvailable(
                f"{_spell(asked)} names device {missing[0]}, but accelerator '{name}' has "
                f"{self._there()} here"
            )
        return asked

    def _all(self) -> int:
        if self.count is None:
            raise InvalidRequest(
                f"devices='all' (-1) has no meaning for accelerator '{self.accelerator.name}', "
                "which does not count its devices; give a number"
            )
        if not self.count:
            raise NotAvailable(f"accelerator '{self.accelerator.name}' has no devices here")
        return self.count

    def _why(self, wanted: int) -> str:
        if self.request.devices is not None or self.detection is None:
            return f"devices={wanted} was asked for"
        return f"{self.detection.reason} with {wanted} per node"

    def _more_devices(self, wanted: int) -> str:
        """What to write where the launcher decides what a process sees."""
        if self.detection is None or not self.detection.devices_hint:
            return ""
        hints = [_way_out(self.detection.devices_hint, wanted)]
        if self.count and self.detection.processes_hint:
            hints.append(_way_out(self.detection.processes_hint, self.count))
        return f"; {', or '.join(hints)}"

    def _there(self) -> str:
        indices = ", ".join(map(str, range(self.count or 0)))
        return f"{self.count} ({indices})" if indices else "none"

    # -- nodes ---------------------------------------------------------------------------------

    def _nodes(self, processes: int) -> int | tuple[int, int]:
        asked = self.request.num_nodes
        found = self._nodes_found(processes)
        if found is None:
            return asked or 1
        least, most = asked if isinstance(asked, tuple) else (asked or found, asked or found)
        if self.detection and not least <= found <= most:
            wanted = least if least == most else f"'{least}:{most}'"
            nearest = least if found < least else most
            raise InvalidRequest(
                f"num_nodes={wanted} was asked for, but {self.detection.reason} on {found} "
                f"node(s); {_way_out(self.detection.nodes_hint, nearest)}, or leave num_nodes out"
            )
        return found

    def _nodes_found(self, processes: int) -> int | None:
        """How many nodes the launcher made processes on, where it says so."""
        if self.detection is None or self.detection.world_size is None:
            return None
        # Without the number per node, each is taken to have as many as are needed.
        per_node = self.detection.processes_per_node or processes
        return -(-self.detection.world_size // per_node)


def _spell(devices: Devices) -> str:
    return f"devices={list(devices)}" if isinstance(devices, tuple) else f"devices={devices!r}"


def _way_out(hint: str, wanted: int) -> str:
    """What a launcher says how to have that number of something."""
    return hint.replace("{wanted}", str(wanted)) or "make the two equal"
