"""Ranks of jsrun and of Kubeflow's pods, made by a stand-in.

Neither is to be had without a cluster. What they do is to start processes with certain variables,
and that is what the test does; everything from there on is real.
"""

from __future__ import annotations

import socket
import sys
import uuid
from pathlib import Path

import pytest
import torch

from tests.endtoend.commands import SCRIPTS
from tests.endtoend.test_parity import alone, check

__all__ = ["alone"]


def jsrun(rank: int) -> dict[str, str]:
    """What a task of ``jsrun -n1 -a2`` finds."""
    return {
        "LSB_HOSTS": "batch3 h41n04 h41n04",
        "LSB_MCPU_HOSTS": "batch3 1 h41n04 2",
        "JSM_NAMESPACE_RANK": str(rank),
        "JSM_NAMESPACE_SIZE": "2",
        "JSM_NAMESPACE_LOCAL_RANK": str(rank),
        "JSM_NAMESPACE_LOCAL_SIZE": "2",
    }


def pod(rank: int) -> dict[str, str]:
    """What a pod of a PyTorchJob with a master and a worker finds."""
    return {
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(rank),
        "PET_NPROC_PER_NODE": "auto",
        # The pods' way to each other; both are here.
        "GLOO_SOCKET_IFNAME": "lo",
    }


def own_address() -> str:
    """One by which others know this computer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this computer has no address but loopback")
        return str(probe.getsockname()[0])


@pytest.mark.parametrize("launcher", ["lsf", "kubeflow"])
def test_the_parameters_are_those_of_one_process(
    launcher: str, start, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.ckpt"
    if launcher == "lsf":
        common, variables = {"LSB_JOBID": str(uuid.uuid4().int)}, jsrun
    else:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        common, variables = {"MASTER_ADDR": own_address(), "MASTER_PORT": str(port)}, pod
    ranks = [
        start(sys.executable, SCRIPTS / "train.py", path, environ={**common, **variables(rank)})
        for rank in (0, 1)
    ]
    for rank in ranks:
        result = rank.finish()
        assert result.status == 0, result.err
    check(path, alone, ranks=2)
