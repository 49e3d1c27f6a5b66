"""``docs/clusters.md``: the order, the ports, the variables and the errors are as it says."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.core.test_kubeflow import ELASTIC, PYTORCH_JOB
from tests.core.test_mpi import MPICH, OPEN_MPI_4, dealt
from tests.pages import matches

from torchweft.builtin.hooks import torchweft_launchers
from torchweft.builtin.launchers.detect_mpi import mpi
from torchweft.builtin.launchers.meeting_point import PORTS, MeetingPoint
from torchweft.builtin.launchers.mpi import MPI
from torchweft.catalog import Catalog
from torchweft.errors import TorchweftError
from torchweft.manager import Manager
from torchweft.rank import RankInfo
from torchweft.request import RunRequest
from torchweft.resolve import resolve

PAGE = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text(encoding="utf-8")
ERRORS = [
    re.sub(r"\s*\n> ", " ", quote).removeprefix("> ").strip()
    for quote in re.findall(r"^(?:> .*\n)+", PAGE, re.MULTILINE)
]
SAYS_NODE = {**OPEN_MPI_4, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
ONE_NODE = {
    **SAYS_NODE,
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_MCA_orte_num_nodes": "1",
}
SECOND = {**ONE_NODE, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def meet(environ: dict[str, str]) -> None:
    MPI().rendezvous(MPI().rank(environ), environ)


def decide(environ: dict[str, str]) -> None:
    catalog = Catalog(Manager.from_entry_points({}).declared)
    resolve(RunRequest.parse(accelerator="cpu"), catalog, environ=environ)


def meet_where_it_is_taken(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        meet({**ONE_NODE, "MASTER_PORT": str(port)})


def meet_nobody(port: int) -> None:
    rank: RankInfo = MPI().rank(SECOND)
    point = MeetingPoint(
        address="127.0.0.1",
        port=port,
        address_from="all ranks are on one node",
        port_from="MASTER_PORT chose it",
        set_address="",
        set_port="",
    )
    replace(point, wait=0.0).rendezvous(rank)


#: What raises each, by its first words; given a port that is free.
CALLS: dict[str, Callable[[int], object]] = {
    "port 29500 of": meet_where_it_is_taken,
    "the address of rank 0, 'n": lambda port: meet(
        {**OPEN_MPI_4, "MASTER_ADDR": "nowhere.invalid"}
    ),
    "rank 0 is on": lambda port: meet({**SAYS_NODE, "MASTER_ADDR": "192.0.2.77"}),
    "the address of rank 0 is": lambda port: meet({**OPEN_MPI_4, "MASTER_ADDR": "localhost"}),
    "rank 1 of 2 looked": meet_nobody,
    "the 4 ranks": lambda port: meet(OPEN_MPI_4),
    "nothing in": lambda port: meet({**MPICH, "MASTER_ADDR": "192.0.2.1"}),
    "mpirun started": lambda port: mpi(
        {**OPEN_MPI_4, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    ),
    "Kubeflow started this process, but the job wants": lambda port: decide(
        {**PYTORCH_JOB, "RANK": "0", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "4"}
    ),
    "Kubeflow started this process, but the job is": lambda port: decide(ELASTIC),
}


@pytest.mark.parametrize("quoted", ERRORS, ids=range(len(ERRORS)))
def test_an_error_of_the_page(quoted: str) -> None:
    (call,) = [call for start, call in CALLS.items() if quoted.startswith(start)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with pytest.raises(TorchweftError) as caught:
        call(port)
    said = str(caught.value).replace(socket.gethostname(), "node0").replace(str(port), "29500")
    said = said.replace("looked 0 s", "looked 1800 s")
    assert matches(quoted, said), said


def test_every_error_is_there() -> None:
    assert len(ERRORS) == len(CALLS)


def test_the_order_is_the_specs() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE, re.MULTILINE))
    outside = {spec.name: str(spec.priority) for spec in torchweft_launchers() if spec.outside}
    assert rows == outside
    assert list(rows) == sorted(rows, key=lambda name: -int(rows[name]))


def test_the_ports_are_the_pages() -> None:
    assert f"One of {PORTS[0]} to {PORTS[-1]}, which follows" in PAGE
    assert f"one of {len(PORTS)}" in PAGE


def test_the_variables_are_those_that_are_read() -> None:
    for name in (*dealt(0, 1, 0, 1), *OPEN_MPI_4):
        if name.startswith(("PMIX_", "OMPI_UNI", "OMPI_MCA_orte_hnp")):
            continue
        assert f"`{name}`" in PAGE, name
