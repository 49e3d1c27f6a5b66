"""jsrun made this process, in a job of LSF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torchweft.api import RankInfo, Rendezvous
from torchweft.builtin.launchers.detect_lsf import JSRUN
from torchweft.builtin.launchers.lsf_hosts import first_host
from torchweft.builtin.launchers.meeting_point import MeetingPoint
from torchweft.builtin.launchers.outside import Outside

__all__ = ["LSF"]

#: Job, element of an array of jobs, and what jsrun was called for within the job.
_IDS = ("LSB_JOBID", "LSB_JOBINDEX", "PMIX_NAMESPACE")


class LSF(Outside):
    """Started by ``jsrun``, which LSF's Job Step Manager brings."""

    def rank(self, environ: Mapping[str, str]) -> RankInfo:
        """What jsrun told this process, and the ids of job and step."""
        told = (environ.get(name, "") for name in _IDS)
        # An array's elements count from 1; 0 is for a job that is none.
        ids = [text for text in told if text not in ("", "0")]
        return replace(JSRUN.place(environ), run_id="-".join(ids))

    def rendezvous(self, rank: RankInfo, environ: Mapping[str, str]) -> Rendezvous:
        """On loopback where all ranks are on one node; else on the first of LSF's compute nodes."""
        nodes = rank.world_size // rank.local_world_size
        host, source = first_host(environ, nodes)
        point = MeetingPoint.of(
            rank,
            environ,
            job=rank.run_id,
            first_node=host,
            first_node_from=f"the first compute node in {source}",
            set_address=JSRUN.set_address,
            set_port=JSRUN.set_port,
        )
        return point.rendezvous(rank)
