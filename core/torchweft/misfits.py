"""Why a spec does not go with what was decided before it: one clause per reason."""

from __future__ import annotations

from torchweft.plan import Topology
from torchweft.specs import AcceleratorSpec, LauncherSpec, Spec, StrategySpec

__all__ = ["launcher_misfits", "misfits", "strategy_misfits"]


def misfits(
    spec: Spec, accelerator: AcceleratorSpec, strategy: StrategySpec | None = None
) -> list[str]:
    """What any spec has against the accelerator and, where it is decided, the strategy."""
    sentences = _against(spec, accelerator, "device", accelerator.device, spec.devices)
    if strategy is not None:
        sentences += _against(spec, strategy, "strategy", strategy.name, spec.strategies)
    return sentences


def strategy_misfits(
    spec: StrategySpec, accelerator: AcceleratorSpec, topology: Topology
) -> list[str]:
    """What a strategy has against the accelerator and the devices that it would be given."""
    sentences = misfits(spec, accelerator)
    devices = len(topology.devices) * topology.max_nodes
    if spec.processes == "one" and devices > 1:
        sentences.append(f"it runs one process on one device, and there are {devices} to use")
    return sentences


def launcher_misfits(
    spec: LauncherSpec,
    accelerator: AcceleratorSpec,
    strategy: StrategySpec,
    topology: Topology,
    *,
    detected: Spec | None,
) -> list[str]:
    """What a launcher has against all that was decided.

    ``detected``: the launcher that has already made this process, if there is one.
    """
    sentences = misfits(spec, accelerator, strategy)
    if spec.processes == "one" and topology.world_size > 1:
        sentences.append(f"it makes one process, and the plan has {topology.world_size}")
    elif spec.nodes == "one" and topology.max_nodes > 1:
        sentences.append(
            f"it starts processes on this node alone, and the plan has {topology.max_nodes} "
            "nodes; start the script with 'torchweft run --num-nodes … --devices …'"
        )
    if spec.processes == "many" and topology.world_size == 1:
        sentences.append("the plan has one process, which needs no launcher")
    if spec.outside and spec != detected:
        how = f", as '{spec.start}' does," if spec.start else ","
        sentences.append(f"it starts the script from outside{how} and did not start this one")
    return sentences


def _against(spec: Spec, decided: Spec, word: str, name: str, served: tuple[str, ...]) -> list[str]:
    if served and name not in served:
        only = ", ".join(f"'{each}'" for each in served)
        return [f"it does not serve {word} '{name}', only {only}"]
    if not served and spec.kind in decided.exclusive:
        return [f"{decided.kind} '{decided.name}' takes only a {spec.kind} made for it"]
    return []
