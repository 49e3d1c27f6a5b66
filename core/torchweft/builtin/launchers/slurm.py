"""SLURM made the processes: every task of a step is a rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from torchweft import process
from torchweft.api import Launcher, RankInfo, Rendezvous, RunPlan
from torchweft.builtin.launchers.meeting import Place, meet
from torchweft.builtin.launchers.nodelist import hosts
from torchweft.builtin.launchers.slurm_step import Step
from torchweft.handoff import Handoff

__all__ = ["PORTS", "STEP", "Slurm", "threads"]

#: Below those that systems give to outgoing connections, above those of well-known services.
PORTS = range(12000, 28000)
#: How far apart are those of two steps of a job, which may run at once; so may jobs whose numbers
#: are neighbours.
STEP = 997


class Slurm(Launcher):
    """Started by ``srun``, once for every rank."""

    owns_ranks = False

    def launch(
        self,
        plan: RunPlan,
        function: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        *,
        fork_hazard: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """Call the function, if there is one, in this rank; its own result comes back."""
        rank = self.rank(os.environ)
        _enter(rank)
        process.use_threads(threads(os.environ, rank.local_world_size, torch.get_num_threads()))
        process.shorten_lost_peers(rank.rank, rank.world_size)
        return function(*arguments) if function is not None else None

    def rank(self, environ: Mapping[str, str]) -> RankInfo:
        """The place of this task; ranks are counted node by node, however tasks were dealt out."""
        step = Step.read(environ)
        local_world_size = step.per_node[step.node]
        return RankInfo(
            rank=step.node * local_world_size + step.local_task,
            world_size=step.tasks,
            local_rank=step.local_task,
            local_world_size=local_world_size,
            node_rank=step.node,
            run_id=f"slurm-{step.job}.{step.number}",
            restart=step.restart,
        )

    def rendezvous(self, rank: RankInfo, environ: Mapping[str, str]) -> Rendezvous:
        """The first node, at a port that follows from the numbers of the job and the step."""
        step = Step.read(environ)
        port = PORTS[(step.job + STEP * step.number) % len(PORTS)]
        return meet(
            rank,
            environ,
            Place(
                address=next(hosts(step.node_list)),
                address_from=f"the first node of SLURM_STEP_NODELIST={step.node_list}",
                port=port,
                port_from=f"which follows from job {step.job}, step {step.number}",
            ),
        )


def _enter(rank: RankInfo) -> None:
    """Set what libraries read, and let what this rank starts know that it is no rank itself."""
    outer = Handoff.read(os.environ) or Handoff(run_id=rank.run_id)
    inner = replace(outer, launcher="slurm", pid=os.getpid(), parent=None)
    os.environ.update(rank.to_environ())
    os.environ.update(inner.to_environ())


def threads(environ: Mapping[str, str], ranks: int, most: int) -> int:
    """This task's part of the processors that SLURM gave to its ranks on this node.

    ``most``: how many torch would take, which sees what this process is bound to.
    """
    own, given = environ.get("SLURM_CPUS_PER_TASK", ""), environ.get("SLURM_CPUS_ON_NODE", "")
    if own.isdecimal():
        part = int(own)
    else:
        part = (int(given) if given.isdecimal() else most) // ranks
    return max(1, min(part, most))
