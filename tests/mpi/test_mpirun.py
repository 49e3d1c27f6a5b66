"""Real runs under Open MPI's mpirun."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import torch

from tests.endtoend.commands import SCRIPTS
from tests.endtoend.test_parity import check
from tests.mpi.starters import MPIRUN, needs_open_mpi
from torchweft.builtin.launchers.meeting_point import PORTS
from torchweft.testing import LauncherConformance

pytestmark = needs_open_mpi

RANKS = Path(__file__).with_name("ranks.py")
TWO = [*MPIRUN, "-n", "2"]
TORCHWEFT = [sys.executable, "-m", "torchweft"]


class TestConformance(LauncherConformance):
    launcher = "mpi"
    command = (*MPIRUN, "-n", "{n}", "{python}", "{script}")


def test_the_parameters_are_those_of_one_process(
    run, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.ckpt"
    result = run(*TWO, sys.executable, SCRIPTS / "train.py", path)
    assert result.status == 0, result.err
    check(path, alone, ranks=2)


def test_a_failure_is_told_once_by_its_rank(run) -> None:
    result = run(*TWO, sys.executable, RANKS, "fail")
    assert result.status == 1
    assert result.err.count("Traceback (most recent call last)") == 1
    assert "[rank1]: ValueError: rank one has had enough" in result.err
    assert "closed by peer" not in result.err


def test_two_jobs_at_once(start, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    begun = [start(*TWO, sys.executable, RANKS, "meet", folder, "4") for folder in folders]
    for command in begun:
        result = command.finish()
        assert result.status == 0, result.err
    said = [[(folder / rank).read_text().split() for rank in "01"] for folder in folders]
    for first, second in said:
        assert first[0] == second[0] == "3"
        assert first[1:5] == second[1:5]
        assert (first[2], int(first[3]) in PORTS) == ("127.0.0.1", True)
    one, other = said[0][0], said[1][0]
    assert one[1] != other[1]
    assert one[3] != other[3]


def test_another_number_of_devices_is_refused(run) -> None:
    result = run(*TWO, *TORCHWEFT, "plan", "--devices", "4")
    assert result.status != 0
    assert (
        "error: devices=4 with strategy 'ddp' needs 4 process(es) per node, but mpirun started "
        "this process with 2 per node; write 'mpirun --map-by ppr:4:node -n TOTAL', or leave "
        "devices out"
    ) in result.err


def test_the_plan_tells_who_made_the_processes(run, tmp_path: Path) -> None:
    # What two processes print may be mixed.
    alone = 'folder=$1; shift; exec "$@" > "$folder/$OMPI_COMM_WORLD_RANK"'
    result = run(*TWO, "sh", "-c", alone, "sh", tmp_path, *TORCHWEFT, "plan", "--json")
    assert result.status == 0, result.err
    for rank in "01":
        plan = json.loads((tmp_path / rank).read_text())
        assert plan["summary"] == "ddp on 2 x cpu, 32-true, launched by mpi"
        assert plan["decisions"][3]["why"] == "detected: mpirun started this process"


def test_a_port_in_use(run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [*TWO, "-x", f"MASTER_PORT={port}", sys.executable, RANKS, "fail"]
        result = run(*command)
    assert result.status == 1
    assert result.err.count("Traceback (most recent call last)") == 1
    assert (
        f"torchweft.errors.NotAvailable: port {port} of {socket.gethostname()}, on which rank 0 is "
        "to serve the run's store, is in use; MASTER_PORT chose it; choose another for all ranks: "
        "mpirun -x MASTER_PORT=PORT"
    ) in result.err


def test_a_main_address_that_does_not_resolve(run) -> None:
    result = run(*TWO, "-x", "MASTER_ADDR=nowhere.invalid", sys.executable, RANKS, "fail")
    assert result.status == 1
    assert (
        "torchweft.errors.NotAvailable: the address of rank 0, 'nowhere.invalid' (MASTER_ADDR names"
    ) in result.err
    assert "[c10d]" not in result.err
