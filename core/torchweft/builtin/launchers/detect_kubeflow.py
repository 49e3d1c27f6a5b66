"""Whether Kubeflow made this process, one in each pod. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchweft.builtin.launchers.starter import another_run
from torchweft.errors import InvalidRequest
from torchweft.rank import RankInfo
from torchweft.specs import Detection

__all__ = ["kubeflow", "pod"]

_PROCESSES_HINT = (
    "start {wanted} in each pod with 'torchweft run --devices {wanted} --num-nodes $PET_NNODES "
    "--node-rank $PET_NODE_RANK --main-address $MASTER_ADDR --main-port $MASTER_PORT train.py' "
    "as its command"
)
_NODES_HINT = "set {wanted} replicas in all of the PyTorchJob, or numNodes of the TrainJob"

#: Set in every container of Kubernetes.
_KUBERNETES = "KUBERNETES_SERVICE_HOST"
#: Whoever sets one of these has made processes within the pod; the others are theirs then.
_WITHIN_A_POD = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID")
_PER_POD = "PET_NPROC_PER_NODE"


def kubeflow(environ: Mapping[str, str]) -> Detection | None:
    """The one process of a pod of a PyTorchJob, or of a TrainJob.

    A job of a single pod is none of several, and what serves any computer serves it too. One that
    means more than one process in a pod, or that is elastic, cannot be made of these processes.
    """
    if _KUBERNETES not in environ or any(name in environ for name in _WITHIN_A_POD):
        return None
    if another_run(environ):
        return None
    elastic = _elastic(environ)
    place = None if elastic else pod(environ)
    if not elastic and (place is None or place.world_size == 1):
        return None
    return Detection(
        reason="Kubeflow started this process",
        world_size=place.world_size if place is not None else None,
        processes_per_node=1,
        objection=_several_per_pod(environ, place.world_size) if place is not None else elastic,
        processes_hint=_PROCESSES_HINT,
        nodes_hint=_NODES_HINT,
    )


def pod(environ: Mapping[str, str]) -> RankInfo | None:
    """Which of the job's pods this is; None where there is no such job.

    ``RANK`` is that of a pod, also in ``WORLD_SIZE`` processes that torchrun would make of them.
    """
    names = _names(environ)
    if names is None:
        return None
    rank, size = names
    number, pods = _number(environ, rank), _number(environ, size)
    if number >= pods:
        raise InvalidRequest(
            f"Kubeflow started this process, but the environment variable {rank} is {number}, and "
            f"{size} is {pods}; pods count from 0, so that {rank} is less than {size}"
        )
    return RankInfo(rank=number, world_size=pods, node_rank=number)


def _names(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The variables with the number of this pod, and of all; None where there is no such job."""
    if all(name in environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return "RANK", "PET_NNODES" if "PET_NNODES" in environ else "WORLD_SIZE"
    if all(name in environ for name in ("PET_NODE_RANK", "PET_NNODES", "PET_MASTER_ADDR")):
        return "PET_NODE_RANK", "PET_NNODES"
    return None


def _several_per_pod(environ: Mapping[str, str], pods: int) -> str:
    """Why the job is none of one process in each pod; empty: it is."""
    # "auto" leaves it to whoever starts processes, which is nobody here.
    wanted = environ.get(_PER_POD, "auto")
    if wanted in ("auto", "1"):
        return ""
    rank, _ = _names(environ) or ("RANK", "")
    prefix = "" if rank == "RANK" else "PET_"
    devices = wanted if wanted.isdigit() else "all"
    return (
        f"the job wants {wanted} processes in each of its {pods} pods ({_PER_POD}), and python "
        f"started one; make the pods' command 'torchrun train.py', or 'torchweft run --devices "
        f"{devices} --num-nodes {pods} --node-rank ${rank} --main-address ${prefix}MASTER_ADDR "
        f"--main-port ${prefix}MASTER_PORT train.py'"
    )


def _elastic(environ: Mapping[str, str]) -> str:
    """Why pods cannot tell their ranks; empty: they can."""
    names = _names(environ)
    rendezvous = "PET_RDZV_ENDPOINT" in environ and environ.get("PET_NNODES") != "1"
    if not rendezvous and (names is None or ":" not in environ[names[1]]):
        return ""
    return (
        f"the job is elastic (PET_NNODES={environ.get('PET_NNODES', '')}), so that the pods learn "
        "their ranks from torch's agent alone; make their command 'torchrun train.py', which "
        "reads the same variables"
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not re.fullmatch(r"[0-9]+", text):
        raise InvalidRequest(
            f"Kubeflow started this process, but the environment variable {name} is '{text}'; it "
            "takes a number from 0"
        )
    return int(text)
