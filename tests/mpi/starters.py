"""The commands that make processes for MPI, where they are installed."""

from __future__ import annotations

import shutil
import subprocess

import pytest

__all__ = ["MPIEXEC", "MPIRUN", "needs_hydra", "needs_open_mpi"]

#: As root, as in a container; and on fewer cores than ranks.
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe"]
MPIEXEC = ["mpiexec.hydra"]


def _says(command: list[str], words: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return words in done.stdout + done.stderr


needs_open_mpi = pytest.mark.skipif(
    not _says(MPIRUN[:1], "Open MPI"),
    reason="Open MPI's mpirun is not installed (Debian: openmpi-bin)",
)
needs_hydra = pytest.mark.skipif(
    not _says(MPIEXEC, "HYDRA"), reason="mpiexec.hydra is not installed (Debian: mpich)"
)
