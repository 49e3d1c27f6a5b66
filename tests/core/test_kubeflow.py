"""What Kubeflow's operators set in pods, by their sources; there is no cluster here."""

from __future__ import annotations

import os
import socket

import pytest

from torchweft.builtin.launchers.detect_kubeflow import kubeflow
from torchweft.builtin.launchers.kubeflow import Kubeflow
from torchweft.errors import InvalidRequest, NotAvailable
from torchweft.handoff import Handoff
from torchweft.rank import RankInfo, Rendezvous

POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
#: The training operator, 1.6 and before: the second of two workers of a PyTorchJob.
OLD = {
    **POD,
    "PYTHONUNBUFFERED": "0",
    "MASTER_ADDR": "digits-master-0",
    "MASTER_PORT": "23456",
    "WORLD_SIZE": "3",
    "RANK": "2",
}
#: The same from 1.7 on.
PYTORCH_JOB = {
    **OLD,
    "PET_NNODES": "3",
    "PET_NODE_RANK": "2",
    "PET_NPROC_PER_NODE": "auto",
    "PET_MASTER_ADDR": "digits-master-0",
    "PET_MASTER_PORT": "23456",
}
#: The trainer, 2.0: a TrainJob with numNodes=2.
TRAIN_JOB = {
    **POD,
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "1",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "digits-node-0-0.digits",
    "PET_MASTER_PORT": "29500",
}
#: A PyTorchJob with an elastic policy and no master.
ELASTIC = {
    **POD,
    "PET_NNODES": "1:4",
    "PET_NPROC_PER_NODE": "1",
    "PET_RDZV_ENDPOINT": "digits-worker-0:23456",
    "PET_RDZV_BACKEND": "c10d",
    "PET_MAX_RESTARTS": "3",
}


@pytest.mark.parametrize(
    ("environ", "pods"), [(OLD, 3), (PYTORCH_JOB, 3), (TRAIN_JOB, 2)], ids=["old", "job", "train"]
)
def test_one_process_in_each_pod(environ: dict[str, str], pods: int) -> None:
    found = kubeflow(environ)
    assert found is not None
    assert (found.reason, found.world_size, found.processes_per_node) == (
        "Kubeflow started this process",
        pods,
        1,
    )
    assert found.processes_hint.startswith(
        "start {wanted} in each pod with 'torchweft run --devices {wanted} --num-nodes $PET_NNODES "
    )
    assert found.nodes_hint.startswith("set {wanted} replicas in all of the PyTorchJob")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        POD,
        # The same variables where there is no Kubernetes.
        {key: value for key, value in OLD.items() if key not in POD},
        # A rank that torchrun made in such a pod, and one of another launcher.
        {**PYTORCH_JOB, "TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "0", "RANK": "2"},
        {**OLD, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        # A pod of its own: as on any computer.
        {**OLD, "WORLD_SIZE": "1", "RANK": "0"},
        {**TRAIN_JOB, "PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "4"},
    ],
)
def test_what_is_none_of_several_pods(environ: dict[str, str]) -> None:
    assert kubeflow(environ) is None


def test_a_rank_of_torchweft_is_none_of_kubeflow() -> None:
    mine = Handoff(run_id="a", launcher="torchrun", pid=os.getpid())
    stale = Handoff(run_id="a", launcher="torchrun", pid=os.getpid() + 1)
    assert kubeflow({**PYTORCH_JOB, **mine.to_environ()}) is None
    assert kubeflow({**PYTORCH_JOB, **stale.to_environ()}) is None


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        (OLD, RankInfo(rank=2, world_size=3, node_rank=2, run_id="digits-master-0")),
        (PYTORCH_JOB, RankInfo(rank=2, world_size=3, node_rank=2, run_id="digits-master-0")),
        (TRAIN_JOB, RankInfo(rank=1, world_size=2, node_rank=1, run_id="digits-node-0-0.digits")),
    ],
    ids=["old", "job", "train"],
)
def test_a_pod_is_a_rank_and_a_node(environ: dict[str, str], rank: RankInfo) -> None:
    assert Kubeflow().rank(environ) == rank


# -- more than one process in a pod ---------------------------------------------------------------


def objection(environ: dict[str, str]) -> str:
    found = kubeflow(environ)
    assert found is not None
    return found.objection


def test_a_pytorch_job_with_processes_that_nobody_makes() -> None:
    # WORLD_SIZE counts processes then, and RANK still counts pods.
    environ = {**PYTORCH_JOB, "PET_NPROC_PER_NODE": "4", "WORLD_SIZE": "12"}
    assert objection(environ) == (
        "the job wants 4 processes in each of its 3 pods (PET_NPROC_PER_NODE), and python started "
        "one; make the pods' command 'torchrun train.py', or 'torchweft run --devices 4 "
        "--num-nodes 3 --node-rank $RANK --main-address $MASTER_ADDR --main-port $MASTER_PORT "
        "train.py'"
    )


def test_a_train_job_with_a_process_for_every_gpu() -> None:
    assert objection({**TRAIN_JOB, "PET_NPROC_PER_NODE": "gpu"}) == (
        "the job wants gpu processes in each of its 2 pods (PET_NPROC_PER_NODE), and python "
        "started one; make the pods' command 'torchrun train.py', or 'torchweft run --devices all "
        "--num-nodes 2 --node-rank $PET_NODE_RANK --main-address $PET_MASTER_ADDR --main-port "
        "$PET_MASTER_PORT train.py'"
    )


def test_an_elastic_job_needs_torchs_agent() -> None:
    assert objection(ELASTIC) == (
        "the job is elastic (PET_NNODES=1:4), so that the pods learn their ranks from torch's "
        "agent alone; make their command 'torchrun train.py', which reads the same variables"
    )
    # What the agent makes of it.
    agent = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert kubeflow({**ELASTIC, **agent}) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"RANK": "3"},
            (
                "Kubeflow started this process, but the environment variable RANK is 3, and "
                "PET_NNODES is 3; pods count from 0, so that RANK is less than PET_NNODES"
            ),
        ),
        (
            {"RANK": "second"},
            (
                "Kubeflow started this process, but the environment variable RANK is 'second'; it "
                "takes a number from 0"
            ),
        ),
    ],
)
def test_variables_that_cannot_be(changed: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        kubeflow({**PYTORCH_JOB, **changed})
    assert str(caught.value) == words


# -- where they meet ------------------------------------------------------------------------------


@pytest.fixture
def free() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("", 0)) as found:
        return int(found.getsockname()[1])


def first_pod(environ: dict[str, str], address: str, port: int) -> Rendezvous:
    """Where the first pod meets the others; it listens no longer."""
    prefix = "PET_" if "RANK" not in environ else ""
    rank = "RANK" if "RANK" in environ else "PET_NODE_RANK"
    changed = {f"{prefix}MASTER_ADDR": address, f"{prefix}MASTER_PORT": str(port), rank: "0"}
    environ = {**environ, **changed}
    found = Kubeflow().rendezvous(Kubeflow().rank(environ), environ)
    assert found.listen_fd is not None
    socket.socket(fileno=found.listen_fd).close()
    return found


@pytest.mark.parametrize("environ", [OLD, PYTORCH_JOB, TRAIN_JOB], ids=["old", "job", "train"])
def test_the_first_pod_is_where_they_meet(environ: dict[str, str], free: int) -> None:
    # That of a service, which is not an address of the pod itself.
    found = first_pod(environ, "192.0.2.10", free)
    assert (found.address, found.port, found.hosts) == ("192.0.2.10", free, True)
    assert found.prefix == "torchweft/192.0.2.10/0"


def test_a_port_in_use(free: int) -> None:
    with socket.create_server(("", free)):
        with pytest.raises(
            NotAvailable,
            match=rf"^port {free} of .* is in use; MASTER_PORT chose it; choose another for all "
            r"ranks: set MASTER_PORT in the pods' env$",
        ):
            first_pod(OLD, "192.0.2.10", free)


def test_loopback_is_no_address_for_several_pods(free: int) -> None:
    with pytest.raises(InvalidRequest, match=r"name the host of rank 0: set MASTER_ADDR in the p"):
        first_pod(OLD, "localhost", free)


def test_a_name_that_never_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchweft.builtin.launchers.kubeflow._PATIENCE", 0.1)
    environ = {**OLD, "MASTER_ADDR": "digits-master-0.invalid"}
    with pytest.raises(NotAvailable) as caught:
        Kubeflow().rendezvous(Kubeflow().rank(environ), environ)
    words = str(caught.value)
    assert words.startswith("the address of rank 0, 'digits-master-0.invalid' (MASTER_ADDR names")
    assert words.endswith("; set one that all nodes know: set MASTER_ADDR in the pods' env")
