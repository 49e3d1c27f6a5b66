"""SLURM made the processes: every task of a step is a rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from torchweft import process
from torchweft.api import RankInfo, Rendezvous, RunPlan
from torchweft.builtin.launchers.meeting_point import MeetingPoint
from torchweft.builtin.launchers.nodelist import hosts
from torchweft.builtin.launchers.outside import Outside
from torchweft.builtin.launchers.slurm_step import Step
from torchweft.handoff import Handoff

__all__ = ["Slurm", "threads"]

_SET = "export {}=…, before srun"


class Slurm(Outside):
    """Started by ``srun``, once for every rank."""

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
        return super().launch(plan, function, arguments, fork_hazard=fork_hazard)

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
        """On loopback where all ranks are on one node; else on the first node of the step."""
        return self.meeting_point(rank, environ).rendezvous(rank)

    def meeting_point(self, rank: RankInfo, environ: Mapping[str, str]) -> MeetingPoint:
        """The first node, at the port of the job and the step."""
        step = Step.read(environ)
        return MeetingPoint.of(
            rank,
            environ,
            job=rank.run_id,
            first_node=next(hosts(step.node_list)),
            first_node_from=f"the first node of SLURM_STEP_NODELIST={step.node_list}",
            set_address=_SET.format("MASTER_ADDR"),
            set_port=_SET.format("MASTER_PORT"),
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
