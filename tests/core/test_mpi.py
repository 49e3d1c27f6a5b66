"""What mpirun and mpiexec leave in the environment, as it was recorded; real runs are elsewhere."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from torchweft.builtin.launchers.detect_mpi import HYDRA, OPEN_MPI, mpi, starter_of
from torchweft.builtin.launchers.mpi import MPI
from torchweft.builtin.launchers.mpi_job import mpi_job
from torchweft.errors import InvalidRequest, NotAvailable
from torchweft.handoff import VARIABLE, Handoff
from torchweft.rank import RankInfo

#: mpirun --host node0:2,node1:2 -n 4, of Open MPI 4.1.4; the variables that say something.
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "4",
    "OMPI_MCA_orte_num_nodes": "2",
    "OMPI_MCA_ess_base_jobid": "545390593",
    "OMPI_MCA_orte_precondition_transports": "17828e46c9e5620e-a04b45a95deeed15",
    "OMPI_MCA_orte_hnp_uri": "545390592.0;tcp://192.0.2.2:33163;tcp6://[fd00::2]:35949",
    "PMIX_NAMESPACE": "545390593",
    "PMIX_RANK": "3",
    "PMIX_HOSTNAME": "node1",
    "PMIX_SERVER_URI2": "545390592.2;tcp4://127.0.0.1:40235",
}
#: mpirun -n 2, of Open MPI 5.0.11.
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_WORLD_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-node0-18213@1",
    "PMIX_RANK": "1",
    "PMIX_SERVER_URI2": "prterun-node0-18213@0.0;tcp4://127.0.0.1:58041",
}
#: mpiexec -hosts node0,node1 -ppn 2 -n 4, of MPICH 4.0.2; 5.0.2 adds PMI_HOSTNAME.
MPICH = {
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "2",
    "PMI_FD": "99999",
    "HYDI_CONTROL_FD": "7",
}
#: mpiexec -n 2, of Intel MPI 2021.19.
INTEL = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
    "PMI_FD": "99999",
    "I_MPI_HYDRA_UUID": "1d470000-51e0-63f4-3e61-0600c471bf3b",
}


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        (OPEN_MPI_4, ("mpirun started this process", 4, 2)),
        (OPEN_MPI_5, ("mpirun started this process", 2, 2)),
        (MPICH, ("mpiexec started this process", 4, 2)),
        (INTEL, ("mpiexec started this process", 2, 2)),
        ({}, None),
        # A daemon of srun --mpi=pmix, in which no mpirun had a part.
        ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.7.0", "SLURM_PROCID": "1"}, None),
    ],
    ids=["Open MPI 4", "Open MPI 5", "MPICH", "Intel MPI", "nobody", "srun with PMIx"],
)
def test_who_made_the_process(environ: dict[str, str], told: tuple[str, int, int] | None) -> None:
    found = mpi(environ)
    assert told == (found and (found.reason, found.world_size, found.processes_per_node))


def test_how_to_have_other_numbers() -> None:
    open_mpi, mpich = mpi(OPEN_MPI_4), mpi(MPICH)
    assert open_mpi is not None
    assert mpich is not None
    assert open_mpi.processes_hint == "write 'mpirun --map-by ppr:{wanted}:node -n TOTAL'"
    assert open_mpi.nodes_hint == "write 'mpirun --host HOST:N,…' with {wanted} hosts"
    assert mpich.processes_hint == "write 'mpiexec -ppn {wanted} -n TOTAL'"


def test_which_rank_of_which_node() -> None:
    # OMPI_COMM_WORLD_NODE_RANK is 1 of rank 1 too, which is on the first node.
    assert MPI().rank(OPEN_MPI_4) == RankInfo(
        rank=3,
        world_size=4,
        local_rank=1,
        local_world_size=2,
        node_rank=1,
        run_id="545390593-17828e46c9e5620e-a04b45a95deeed15",
    )
    assert MPI().rank(MPICH).node_rank == 1
    assert MPI().rank({**MPICH, "PMI_RANK": "1", "MPI_LOCALRANKID": "1"}).node_rank == 0


# -- others that set the same variables ---------------------------------------------------------

SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
PMI2 = {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "19", "PMI_JOBID": "7.0"}


def test_srun_lends_itself_the_variables_of_pmi() -> None:
    assert mpi({**SRUN, **PMI2}) is None
    # mpirun and mpiexec in a batch script, whose own variables every rank inherits.
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    assert mpi({**script, **MPICH}) is not None
    assert mpi({**SRUN, **OPEN_MPI_4}) is not None


def test_jsrun_sets_the_variables_of_open_mpi_too() -> None:
    jsrun = {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "4", "LSB_JOBID": "12"}
    assert mpi({**jsrun, **OPEN_MPI_4}) is None
    # mpirun within the one process that jsrun made.
    jsrun = {"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "1", "LSB_JOBID": "12"}
    assert starter_of({**jsrun, **OPEN_MPI_4}) is OPEN_MPI


def test_a_rank_of_torchweft_is_none_of_mpi() -> None:
    mine = Handoff(run_id="a", launcher="fork", pid=os.getpid())
    assert mpi({**OPEN_MPI_4, **mine.to_environ()}) is None
    stale = Handoff(run_id="a", launcher="torchrun", pid=os.getpid() + 1)
    assert mpi({**OPEN_MPI_4, **stale.to_environ()}) is None
    # mpirun torchweft run train.py: the script makes no processes of its own.
    flags = Handoff(run_id="a", flags={"strategy": "ddp"}, pid=os.getpid())
    assert mpi({**OPEN_MPI_4, **flags.to_environ()}) is not None
    assert VARIABLE in flags.to_environ()


# -- placed otherwise ---------------------------------------------------------------------------


def dealt(rank: int, size: int, local_rank: int, local_size: int, **more: str) -> dict[str, str]:
    """Variables of mpiexec for one rank."""
    return {
        HYDRA.rank: str(rank),
        HYDRA.world_size: str(size),
        HYDRA.local_rank: str(local_rank),
        HYDRA.local_world_size: str(local_size),
        **more,
    }


def placed(nodes: list[list[int]]) -> list[dict[str, str]]:
    """The same, of all ranks, given those of each node."""
    size = sum(map(len, nodes))
    return [dealt(rank, size, i, len(own)) for own in nodes for i, rank in enumerate(own)]


def refused(environs: list[dict[str, str]]) -> list[str]:
    """What the ranks say that refuse it."""
    said = []
    for environ in environs:
        try:
            mpi(environ)
        except InvalidRequest as error:
            said.append(str(error))
    return said


def test_ranks_that_are_dealt_out_in_turn_are_refused() -> None:
    said = refused(placed([[0, 2], [1, 3]]))
    assert said[0] == (
        "mpiexec started rank 2 of 4 as number 1 of 2 on its node; torchweft takes as many ranks "
        "on every node, one node after the other: mpiexec -ppn N"
    )
    assert len(said) == 2


@pytest.mark.parametrize(
    "nodes",
    [
        [[0, 2, 4], [1, 3, 5]],
        [[0, 1], [2, 3, 4, 5]],
        [[0, 1, 2, 3], [4, 5]],
        [[0, 1, 2], [3]],
        [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9, 10, 11]],
        [[1, 0], [3, 2]],
    ],
)
def test_some_rank_notices(nodes: list[list[int]]) -> None:
    assert refused(placed(nodes))


@pytest.mark.parametrize("nodes", [[[0]], [[0, 1]], [[0], [1], [2]], [[0, 1], [2, 3], [4, 5]]])
def test_blocks_are_fine(nodes: list[list[int]]) -> None:
    assert not refused(placed(nodes))
    ranks = [HYDRA.place(environ) for environ in placed(nodes)]
    assert [place.node_rank for place in ranks] == [
        number for number, own in enumerate(nodes) for _ in own
    ]


def test_open_mpi_tells_how_many_nodes_there_are() -> None:
    # One, one and two ranks on three nodes: each node's could be what is on all of them.
    environ = {
        **OPEN_MPI_4,
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_MCA_orte_num_nodes": "3",
    }
    (words,) = refused([environ])
    assert words == (
        "mpirun started rank 3 of 4 as number 1 of 2 on its node; torchweft takes as many ranks "
        "on every node, one node after the other: mpirun --map-by ppr:N:node"
    )


# -- variables that cannot be ---------------------------------------------------------------------


UNSET_PMI = "unset PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS"
UNSET_OPEN_MPI = (
    "unset OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_RANK, "
    "OMPI_COMM_WORLD_LOCAL_SIZE"
)


@pytest.mark.parametrize(
    ("environ", "found", "way_out"),
    [
        (
            {"PMI_RANK": "1", "PMI_SIZE": "4"},
            "MPI_LOCALRANKID is not set; it takes a number from 0; set it for every rank, or",
            UNSET_PMI,
        ),
        (
            # mpiexec -pmi-port, which does not say how many there are.
            {"PMI_PORT": "node0:35575", "PMI_ID": "1", "MPI_LOCALRANKID": "1"},
            "PMI_RANK is not set; it takes a number from 0; set it for every rank, or",
            UNSET_PMI,
        ),
        (
            {**OPEN_MPI_4, "OMPI_COMM_WORLD_SIZE": "four"},
            "OMPI_COMM_WORLD_SIZE is 'four'; it takes a number from 0; set it for every rank, or",
            UNSET_OPEN_MPI,
        ),
        (
            dealt(4, 4, 0, 2),
            (
                "PMI_RANK is 4, and PMI_SIZE is 4; ranks count from 0, so that PMI_RANK is less "
                "than PMI_SIZE;"
            ),
            UNSET_PMI,
        ),
    ],
)
def test_variables_that_cannot_be(environ: dict[str, str], found: str, way_out: str) -> None:
    starter = "mpirun" if "OMPI" in found else "mpiexec"
    words = (
        f"{starter} started this process, but the environment variable {found} {way_out} if this "
        "process is no rank of such a run"
    )
    assert refused([environ]) == [words]


# -- which job ------------------------------------------------------------------------------------


def test_the_jobs_id() -> None:
    assert MPI().rank(OPEN_MPI_5).run_id == "prterun-node0-18213@1"
    assert MPI().rank(INTEL).run_id == "1d470000-51e0-63f4-3e61-0600c471bf3b"
    # Nothing that ranks on several nodes have in common.
    assert MPI().rank(MPICH).run_id == ""
    one_node = dealt(1, 2, 1, 2)
    assert MPI().rank({**one_node, "PMI_PORT": "node0:35575"}).run_id == "node0:35575"


def test_mpich_is_told_by_its_process_manager() -> None:
    """A socket pair of this process stands for that to the manager, who is this process then."""
    one, other = socket.socketpair()
    with one, other:
        environ = dealt(1, 2, 1, 2, PMI_FD=str(one.fileno()))
        place = HYDRA.place(environ)
        found = mpi_job(place, environ)
        assert found.startswith(f"{os.getpid()}-")
        assert found == mpi_job(place, {**environ, "PMI_FD": str(other.fileno())})
        one.send(b"still open")
    assert mpi_job(place, environ) == ""  # closed


@pytest.mark.parametrize("descriptor", ["", "99999", "no number", "pipe"])
def test_where_there_is_no_such_socket(descriptor: str) -> None:
    ends: Any = os.pipe()
    try:
        text = str(ends[0]) if descriptor == "pipe" else descriptor
        environ = dealt(1, 2, 1, 2, PMI_FD=text)
        assert mpi_job(HYDRA.place(environ), environ) == ""
        assert os.fstat(ends[0])  # it is still open
    finally:
        for end in ends:
            os.close(end)


# -- where they meet ------------------------------------------------------------------------------


def test_several_nodes_need_an_address() -> None:
    with pytest.raises(NotAvailable) as caught:
        MPI().rendezvous(MPI().rank(OPEN_MPI_4), OPEN_MPI_4)
    assert str(caught.value) == (
        "the 4 ranks are on 2 nodes, and nothing in the environment says where rank 0 is; name "
        "its host for all of them: mpirun -x MASTER_ADDR=HOST"
    )


def test_several_nodes_of_mpich_need_a_port_too() -> None:
    environ = {**MPICH, "MASTER_ADDR": "192.0.2.1"}
    with pytest.raises(NotAvailable) as caught:
        MPI().rendezvous(MPI().rank(environ), environ)
    assert str(caught.value) == (
        "nothing in the environment tells this job from others, so that the ranks cannot agree "
        "on a port by themselves; choose one for all of them: mpiexec -genv MASTER_PORT PORT"
    )
