"""What jsrun and LSF leave in the environment, by their documentation; neither can be run here."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from torchweft.builtin.launchers.detect_lsf import lsf
from torchweft.builtin.launchers.detect_mpi import mpi
from torchweft.builtin.launchers.lsf import LSF
from torchweft.builtin.launchers.lsf_hosts import first_host
from torchweft.builtin.launchers.meeting_point import port_of
from torchweft.errors import InvalidRequest, NotAvailable
from torchweft.handoff import Handoff
from torchweft.rank import RankInfo
from torchweft.specs import Detection

#: bsub -nnodes 2, then jsrun -n2 -r1 -a4 python train.py: rank 5. The script runs on batch3.
JOB = {
    "LSB_JOBID": "738214",
    "LSB_JOBINDEX": "0",
    "LSB_HOSTS": "batch3 h41n04 h41n04 h41n05 h41n05",
    "LSB_MCPU_HOSTS": "batch3 1 h41n04 2 h41n05 2",
    "LSB_DJOB_NUMPROC": "5",
    "LS_SUBCWD": "/home/ada",
}
RANK = {
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "3",
    "PMIX_RANK": "5",
}
JSRUN = {**JOB, **RANK}
#: Set by it too, for Spectrum MPI.
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


def on_one_node(**more: str) -> dict[str, str]:
    return {
        **JOB,
        "JSM_NAMESPACE_RANK": "0",
        "JSM_NAMESPACE_SIZE": "2",
        "JSM_NAMESPACE_LOCAL_RANK": "0",
        "JSM_NAMESPACE_LOCAL_SIZE": "2",
        **more,
    }


def test_jsrun_made_the_process() -> None:
    detection = Detection(
        reason="jsrun started this process",
        world_size=8,
        processes_per_node=4,
        processes_hint="write 'jsrun -r1 -a{wanted}'",
        nodes_hint="write 'jsrun -n{wanted} -r1', and 'bsub -nnodes {wanted}' or more",
    )
    assert lsf(JSRUN) == detection
    assert lsf({**JSRUN, **OPEN_MPI}) == detection
    assert mpi({**JSRUN, **OPEN_MPI}) is None


def test_a_job_without_jsrun_is_nobodys() -> None:
    assert lsf(JOB) is None
    assert lsf({}) is None
    # mpirun within a job of LSF.
    assert lsf({**JOB, **OPEN_MPI}) is None
    assert mpi({**JOB, **OPEN_MPI}) is not None


def test_a_rank_of_torchweft_is_none_of_jsrun() -> None:
    mine = Handoff(run_id="a", launcher="script", pid=os.getpid())
    stale = Handoff(run_id="a", launcher="script", pid=os.getpid() + 1)
    assert lsf({**JSRUN, **mine.to_environ()}) is None
    assert lsf({**JSRUN, **stale.to_environ()}) is None


def test_which_rank_of_which_run() -> None:
    assert LSF().rank(JSRUN) == RankInfo(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        node_rank=1,
        run_id="738214-3",
    )
    # An element of an array of jobs, and another call of jsrun in it.
    assert LSF().rank({**JSRUN, "LSB_JOBINDEX": "2"}).run_id == "738214-2-3"
    assert LSF().rank({**JSRUN, "PMIX_NAMESPACE": "4"}).run_id == "738214-4"


def test_tasks_that_are_dealt_out_in_turn_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        lsf({**JSRUN, "JSM_NAMESPACE_LOCAL_RANK": "2"})
    assert str(caught.value) == (
        "jsrun started rank 5 of 8 as number 2 of 4 on its node; torchweft takes as many ranks on "
        "every node, one node after the other: jsrun -r1 -aN -d packed"
    )


@pytest.mark.parametrize(
    "name",
    ["JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_SIZE"],
)
def test_a_variable_that_is_missing(name: str) -> None:
    environ = {key: value for key, value in JSRUN.items() if key != name}
    with pytest.raises(InvalidRequest) as caught:
        lsf(environ)
    assert str(caught.value) == (
        f"jsrun started this process, but the environment variable {name} is not set; it takes a "
        "number from 0; set it for every rank, or unset JSM_NAMESPACE_RANK, JSM_NAMESPACE_SIZE, "
        "JSM_NAMESPACE_LOCAL_RANK, JSM_NAMESPACE_LOCAL_SIZE if this process is no rank of such a "
        "run"
    )


# -- the first node -------------------------------------------------------------------------------


def test_the_node_of_the_batch_script_is_not_the_first(tmp_path: Path) -> None:
    ranks = tmp_path / "ranks"
    ranks.write_text("batch3\nh50n01\nh50n01\n\nh50n02\n")
    hosts = tmp_path / "hosts"
    hosts.write_text("batch3\nh60n01\n")
    listed = {"LSB_HOSTS": JOB["LSB_HOSTS"]}
    assert first_host(listed, 2) == ("h41n04", "LSB_HOSTS")
    counted = {**listed, "LSB_MCPU_HOSTS": "batch3 1 h70n01 2 h70n02 2"}
    assert first_host(counted, 2) == ("h70n01", "LSB_MCPU_HOSTS")
    filed = {**counted, "LSB_DJOB_HOSTFILE": str(hosts)}
    assert first_host(filed, 1) == ("h60n01", "LSB_DJOB_HOSTFILE")
    ranked = {**filed, "LSB_DJOB_RANKFILE": str(ranks)}
    assert first_host(ranked, 2) == ("h50n01", "LSB_DJOB_RANKFILE")


def test_where_the_script_runs_on_a_node_that_computes() -> None:
    assert first_host({"LSB_MCPU_HOSTS": "h41n04 42 h41n05 42"}, 2)[0] == "h41n04"


def test_what_tells_nothing_is_passed_over(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    environ = {"LSB_DJOB_RANKFILE": str(tmp_path / "gone"), "LSB_DJOB_HOSTFILE": str(empty)}
    assert first_host(environ, 2) == ("", "")
    assert first_host({**environ, "LSB_HOSTS": "batch3 a b"}, 2) == ("a", "LSB_HOSTS")


# -- where they meet ------------------------------------------------------------------------------


def test_one_node_meets_on_loopback() -> None:
    environ = on_one_node()
    found = LSF().rendezvous(LSF().rank(environ), environ)
    assert found.listen_fd is not None
    socket.socket(fileno=found.listen_fd).close()
    assert (found.address, found.port) == ("127.0.0.1", port_of("738214"))


def test_the_first_node_has_to_be_known() -> None:
    with pytest.raises(NotAvailable) as caught:
        LSF().rendezvous(LSF().rank(RANK), RANK)
    assert str(caught.value) == (
        "the 8 ranks are on 2 nodes, and nothing in the environment says where rank 0 is; name "
        "its host for all of them: export MASTER_ADDR=HOST before jsrun"
    )


def test_the_first_node_does_not_resolve() -> None:
    environ = {**JSRUN, "LSB_HOSTS": "batch3 h41n04.invalid h41n05.invalid"}
    del environ["LSB_MCPU_HOSTS"]
    with pytest.raises(NotAvailable) as caught:
        LSF().rendezvous(LSF().rank(environ), environ)
    words = str(caught.value)
    assert words.startswith(
        "the address of rank 0, 'h41n04.invalid' (the first compute node in LSB_HOSTS), does not "
        f"resolve on {socket.gethostname()}: "
    )
    assert words.endswith("; set one that all nodes know: export MASTER_ADDR=HOST before jsrun")


def test_a_port_in_use() -> None:
    environ = on_one_node(LSB_JOBID="738215")
    port = port_of("738215")
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(
            NotAvailable,
            match=rf"^port {port} of .* is in use; it follows from the job's id, '738215'; choose "
            r"another for all ranks: export MASTER_PORT=PORT before jsrun$",
        ):
            LSF().rendezvous(LSF().rank(environ), environ)


def test_without_a_jobs_id_the_port_is_asked_for() -> None:
    environ = {key: value for key, value in on_one_node().items() if key not in JOB}
    with pytest.raises(NotAvailable, match=r"export MASTER_PORT=PORT before jsrun$"):
        LSF().rendezvous(LSF().rank(environ), environ)
