"""Whether jsrun made this process, in a job of LSF. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping

from torchweft.builtin.launchers.starter import Starter, another_run
from torchweft.specs import Detection

__all__ = ["CHANGE_NODES", "CHANGE_PROCESSES", "JSRUN", "lsf"]

#: Where a plan and what was started differ: how to change the number of processes on a node.
CHANGE_PROCESSES = "'jsrun -r1 -aN' starts N on each node, in one resource set"
#: The same, of nodes.
CHANGE_NODES = "'jsrun -nNODES -r1' uses so many nodes of those that 'bsub -nnodes' allocated"

#: The Job Step Manager's command, which makes the processes of a job of LSF.
JSRUN = Starter(
    name="jsrun",
    rank="JSM_NAMESPACE_RANK",
    world_size="JSM_NAMESPACE_SIZE",
    local_rank="JSM_NAMESPACE_LOCAL_RANK",
    local_world_size="JSM_NAMESPACE_LOCAL_SIZE",
    in_blocks="jsrun -r1 -aN -d packed",
    set_address="export MASTER_ADDR=HOST before jsrun",
    set_port="export MASTER_PORT=PORT before jsrun",
)


def lsf(environ: Mapping[str, str]) -> Detection | None:
    """A process of jsrun.

    Raises ``InvalidRequest`` where its variables contradict each other.
    """
    if not JSRUN.made(environ) or another_run(environ):
        return None
    place = JSRUN.place(environ)
    return Detection(
        reason="jsrun started this process",
        world_size=place.world_size,
        processes_per_node=place.local_world_size,
    )
