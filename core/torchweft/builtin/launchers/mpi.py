"""mpirun or mpiexec made this process; MPI itself is not needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torchweft.api import RankInfo, Rendezvous, RunPlan
from torchweft.builtin.launchers.detect_mpi import HYDRA, starter_of
from torchweft.builtin.launchers.meeting_point import MeetingPoint
from torchweft.builtin.launchers.mpi_job import mpi_job
from torchweft.builtin.launchers.outside import Outside
from torchweft.builtin.launchers.pmi_abort import abort_when_failed

__all__ = ["MPI"]


class MPI(Outside):
    """Started by Open MPI's ``mpirun``, or by ``mpiexec`` of MPICH or Intel MPI."""

    def launch(
        self,
        plan: RunPlan,
        function: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        *,
        fork_hazard: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """Call the function, if there is one, in this rank; its own result comes back."""
        if starter_of(os.environ) is HYDRA:
            abort_when_failed()
        return super().launch(plan, function, arguments, fork_hazard=fork_hazard)

    def rank(self, environ: Mapping[str, str]) -> RankInfo:
        """What the starter told this process, and the job's id."""
        place = (starter_of(environ) or HYDRA).place(environ)
        return replace(place, run_id=mpi_job(place, environ))

    def rendezvous(self, rank: RankInfo, environ: Mapping[str, str]) -> Rendezvous:
        """On loopback where all ranks are on one node; else at ``MASTER_ADDR``.

        Open MPI tells the address of the node on which mpirun runs, which need not be rank 0's.
        """
        starter = starter_of(environ) or HYDRA
        point = MeetingPoint.of(
            rank,
            environ,
            job=rank.run_id,
            first_node="",
            first_node_from="",
            set_address=starter.set_address,
            set_port=starter.set_port,
        )
        return point.rendezvous(rank)
