"""Whether jsrun made this process, in a job of LSF. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping

from torchweft.builtin.launchers.starter import Starter, another_run
from torchweft.specs import Detection

__all__ = ["JSRUN", "lsf"]

#: The Job Step Manager's command, which makes the processes of a job of LSF.
JSRUN = Starter(
    name="jsrun",
    rank="JSM_NAMESPACE_RANK",
    world_size="JSM_NAMESPACE_SIZE",
    local_rank="JSM_NAMESPACE_LOCAL_RANK",
    local_world_size="JSM_NAMESPACE_LOCAL_SIZE",
    processes_hint="write 'jsrun -r1 -a{wanted}'",
    nodes_hint="write 'jsrun -n{wanted} -r1', and 'bsub -nnodes {wanted}' or more",
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
    return JSRUN.detection(environ)
