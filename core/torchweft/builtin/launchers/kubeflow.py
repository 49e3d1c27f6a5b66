"""Kubeflow made this process, one in each pod of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torchweft.api import RankInfo, Rendezvous
from torchweft.builtin.launchers.detect_kubeflow import pod
from torchweft.builtin.launchers.meeting_point import MeetingPoint
from torchweft.builtin.launchers.outside import Outside

__all__ = ["Kubeflow"]

#: Seconds in which the name of a pod that was just made begins to resolve.
_PATIENCE = 60.0


class Kubeflow(Outside):
    """Started by Kubeflow in the pods of a PyTorchJob or a TrainJob."""

    def rank(self, environ: Mapping[str, str]) -> RankInfo:
        """The pod's; what tells jobs apart is the name of the first pod, which all of them know."""
        place = pod(environ) or RankInfo()
        return replace(place, run_id=_address(environ))

    def rendezvous(self, rank: RankInfo, environ: Mapping[str, str]) -> Rendezvous:
        """At the address of the first pod, which the job tells, and which may be a service's."""
        port = environ.get("MASTER_PORT") or environ.get("PET_MASTER_PORT", "")
        told = {"MASTER_ADDR": _address(environ), **({"MASTER_PORT": port} if port else {})}
        point = MeetingPoint.of(
            rank,
            told,
            job=rank.run_id,
            first_node="",
            first_node_from="",
            set_address="set MASTER_ADDR in the pods' env",
            set_port="set MASTER_PORT in the pods' env",
        )
        return replace(point, patience=_PATIENCE, by_name=True).rendezvous(rank)


def _address(environ: Mapping[str, str]) -> str:
    return environ.get("MASTER_ADDR") or environ.get("PET_MASTER_ADDR", "")
