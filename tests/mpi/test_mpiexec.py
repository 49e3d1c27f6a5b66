"""Real runs under the process manager of MPICH, which speaks PMI."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.endtoend.commands import SCRIPTS
from tests.endtoend.test_parity import check
from tests.mpi.starters import MPIEXEC, needs_hydra

pytestmark = needs_hydra

RANKS = Path(__file__).with_name("ranks.py")
TWO = [*MPIEXEC, "-n", "2"]


def test_the_parameters_are_those_of_one_process(
    run, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.ckpt"
    result = run(*TWO, sys.executable, SCRIPTS / "train.py", path)
    assert result.status == 0, result.err
    check(path, alone, ranks=2)


def test_a_failure_ends_the_ranks_that_would_sleep_on(run) -> None:
    # That manager would let them: it minds no exit status of what did not initialise MPI.
    result = run(*TWO, sys.executable, RANKS, "sleep")
    assert result.status == 1
    assert result.err.count("Traceback (most recent call last)") == 1
    assert "[rank1]: ValueError: rank one has had enough" in result.err


ID = (
    "import os, sys; from torchweft.builtin.launchers.mpi_job import mpi_job; "
    "from torchweft.builtin.launchers.detect_mpi import HYDRA; "
    "place = HYDRA.place(os.environ); "
    "print(mpi_job(place, os.environ), file=open(f'{sys.argv[1]}/{place.rank}', 'w'))"
)


@pytest.mark.parametrize("wrapped", [False, True])
def test_all_ranks_of_a_job_know_one_id(run, tmp_path: Path, wrapped: bool) -> None:
    shell = ["sh", "-c", '"$@"; true', "sh"] if wrapped else []  # which stays
    jobs = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        result = run(*TWO, *shell, sys.executable, "-c", ID, folder)
        assert result.status == 0, result.err
        jobs.append([path.read_text().strip() for path in folder.iterdir()])
    (first, second), (third, fourth) = jobs
    assert first == second != third == fourth
    assert first
    assert third
