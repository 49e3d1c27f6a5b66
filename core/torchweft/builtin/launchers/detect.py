"""Whether one of the core's launchers has already made this process. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping

from torchweft.handoff import Handoff
from torchweft.rank import RankInfo
from torchweft.specs import Detection

__all__ = ["fork", "forkserver", "script", "spawn", "torchrun"]

#: What torch's agent, and nobody else, always sets.
_AGENT = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _child_of(launcher: str, environ: Mapping[str, str]) -> Detection | None:
    handoff = Handoff.read(environ)
    if handoff is None or handoff.launcher != launcher:
        return None
    return _detection(f"this process is a rank started by launcher '{launcher}'", environ)


def script(environ: Mapping[str, str]) -> Detection | None:
    """A rank that ``fabric.launch()`` made."""
    return _child_of("script", environ)


def fork(environ: Mapping[str, str]) -> Detection | None:
    """A rank that ``launch(function)`` forked."""
    return _child_of("fork", environ)


def spawn(environ: Mapping[str, str]) -> Detection | None:
    """A rank that ``launch(function)`` spawned."""
    return _child_of("spawn", environ)


def forkserver(environ: Mapping[str, str]) -> Detection | None:
    """A rank that ``launch(function)`` had a fork server make."""
    return _child_of("forkserver", environ)


def torchrun(environ: Mapping[str, str]) -> Detection | None:
    """A worker of torch's agent, started by ``torchweft run`` or by ``torchrun``."""
    handoff = Handoff.read(environ)
    if handoff is not None and handoff.launcher == "torchrun":
        return _detection("'torchweft run' started this process", environ)
    if Handoff.stale(environ) or handoff is not None:
        # The rank's variables came with that hand-off and are as stale, or another launcher's.
        return None
    if all(name in environ for name in _AGENT):
        return _detection("torchrun started this process", environ)
    return None


def _detection(reason: str, environ: Mapping[str, str]) -> Detection:
    rank = RankInfo.from_environ(environ)
    return Detection(
        reason=reason,
        world_size=rank.world_size,
        processes_per_node=rank.local_world_size,
        objection=_uneven(rank, environ.get("GROUP_WORLD_SIZE", "")),
    )


def _uneven(rank: RankInfo, nodes: str) -> str:
    """What is wrong where the nodes, of which torch's agent tells the number, differ in size."""
    if not nodes.isdecimal() or int(nodes) * rank.local_world_size == rank.world_size:
        return ""
    return (
        f"the nodes have different numbers of processes: {rank.local_world_size} of "
        f"{rank.world_size} are on this one of {nodes} nodes; give every node the same --devices "
        "(torchrun: --nproc-per-node)"
    )
