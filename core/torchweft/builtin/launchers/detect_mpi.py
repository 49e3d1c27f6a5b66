"""Whether mpirun or mpiexec made this process. Free of torch, and of MPI."""

from __future__ import annotations

from collections.abc import Mapping

from torchweft.builtin.launchers.detect_lsf import JSRUN
from torchweft.builtin.launchers.starter import Starter, another_run
from torchweft.specs import Detection

__all__ = ["HYDRA", "OPEN_MPI", "mpi", "starter_of"]

#: Open MPI's mpirun. Its ``OMPI_COMM_WORLD_NODE_RANK`` is a rank on the node, not that of a node.
OPEN_MPI = Starter(
    name="mpirun",
    rank="OMPI_COMM_WORLD_RANK",
    world_size="OMPI_COMM_WORLD_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    local_world_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    nodes="OMPI_MCA_orte_num_nodes",
    processes_hint="write 'mpirun --map-by ppr:{wanted}:node -n TOTAL'",
    nodes_hint="write 'mpirun --host HOST:N,…' with {wanted} hosts",
    in_blocks="mpirun --map-by ppr:N:node",
    set_address="mpirun -x MASTER_ADDR=HOST",
    set_port="mpirun -x MASTER_PORT=PORT",
)

#: The process manager of MPICH and of Intel's MPI.
HYDRA = Starter(
    name="mpiexec",
    rank="PMI_RANK",
    world_size="PMI_SIZE",
    local_rank="MPI_LOCALRANKID",
    local_world_size="MPI_LOCALNRANKS",
    processes_hint="write 'mpiexec -ppn {wanted} -n TOTAL'",
    nodes_hint="write 'mpiexec -hosts HOST,…' with {wanted} hosts",
    in_blocks="mpiexec -ppn N",
    set_address="mpiexec -genv MASTER_ADDR HOST",
    set_port="mpiexec -genv MASTER_PORT PORT",
)

#: srun --mpi=pmi2 sets the variables of PMI beside its own.
_SRUN = ("SLURM_PROCID", "SLURM_NTASKS")


def mpi(environ: Mapping[str, str]) -> Detection | None:
    """A process of mpirun (Open MPI) or of mpiexec (MPICH, Intel MPI).

    Raises ``InvalidRequest`` where their variables contradict each other.
    """
    starter = starter_of(environ)
    if starter is None or another_run(environ):
        return None
    return starter.detection(environ)


def starter_of(environ: Mapping[str, str]) -> Starter | None:
    """Which of the two it was; None where neither, or where they only lent their variables."""
    # jsrun sets Open MPI's variables beside its own, as that library expects.
    if OPEN_MPI.made(environ) and not OPEN_MPI.counts_like(JSRUN.rank, JSRUN.world_size, environ):
        return OPEN_MPI
    if HYDRA.made(environ) and not HYDRA.counts_like(*_SRUN, environ):
        return HYDRA
    return None
