"""What all processes of one MPI job know and those of no other do, without asking MPI."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from torchweft.rank import RankInfo

__all__ = ["mpi_job"]

#: Where Open MPI tells it: version 5 by the first alone, version 4 by the other two.
_OPEN_MPI = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_precondition_transports")
#: Intel's.
_UUID = "I_MPI_HYDRA_UUID"
#: An address of the process manager on this node, or a socket that leads to it.
_PORT, _SOCKET = "PMI_PORT", "PMI_FD"


def mpi_job(rank: RankInfo, environ: Mapping[str, str]) -> str:
    """The id of the job; empty where nothing tells it.

    MPICH tells none, but on one node all ranks have the same process manager.
    """
    told = dict.fromkeys(environ[name] for name in _OPEN_MPI if environ.get(name))
    if told:
        return "-".join(told)
    if _UUID in environ:
        return environ[_UUID]
    if rank.local_world_size < rank.world_size:
        return ""
    return environ.get(_PORT, "") or _manager(environ.get(_SOCKET, ""))


def _manager(descriptor: str) -> str:
    """The process at the other end of a socket, by its id and the time of its start."""
    if not descriptor.isdigit() or not hasattr(socket, "SO_PEERCRED"):
        return ""
    with contextlib.suppress(OSError):
        end = socket.socket(fileno=int(descriptor))
        try:
            peer = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        finally:
            end.detach()  # it is the MPI library's
        pid: int = struct.unpack("3i", peer)[0]
        # What follows the name, which may hold anything; the start is the 22nd field.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return f"{pid}-{fields[19].decode()}"
    return ""
