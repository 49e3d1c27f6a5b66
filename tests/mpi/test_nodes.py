"""mpirun over two nodes, each of which is a host name of its own on this computer.

They are namespaces of the kernel: processes of mpirun, of its daemons and of Open MPI are real, and
so is the network between them, which nothing outside can reach. Only the way to the other node is
not ssh.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.endtoend.commands import SCRIPTS, Result
from tests.endtoend.test_parity import check
from tests.mpi.starters import MPIRUN, needs_open_mpi

ADDRESS = "10.77.0.1"
#: A network with one interface, in which a command runs.
NETWORK = (
    "ip link set lo up && ip link add weft0 type veth peer name weft1 && "
    f"ip addr add {ADDRESS}/24 dev weft0 && ip link set weft0 up && ip link set weft1 up && "
    'exec "$@"'
)
#: In place of ssh: options, the host, and words of a command.
AGENT = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec unshare --uts sh -c 'hostname "$1"; shift; exec sh -c "$*"' sh "$host" "$@"
"""
ISOLATED = ["unshare", "--net", "--uts", "sh", "-c", NETWORK, "sh"]


def _can_isolate() -> bool:
    try:
        return subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


pytestmark = [
    needs_open_mpi,
    pytest.mark.skipif(not _can_isolate(), reason="namespaces of the network need root, and ip"),
]


@pytest.fixture
def mpirun(run, tmp_path: Path) -> Callable[..., Result]:
    """Run a command under mpirun on two nodes."""
    agent = tmp_path / "agent"
    agent.write_text(AGENT)
    agent.chmod(0o755)

    def go(per_node: int, *words: object) -> Result:
        hosts = f"first:{per_node},second:{per_node}"
        options = ["-mca", "plm_rsh_agent", str(agent), "--host", hosts, "-n", str(2 * per_node)]
        return run(*ISOLATED, *MPIRUN, *options, *map(str, words))

    return go


def test_the_parameters_are_those_of_one_process(
    mpirun, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.ckpt"
    # Nothing resolves the names of the nodes, by which gloo would look for its interface.
    settings = ["-x", f"MASTER_ADDR={ADDRESS}", "-x", "GLOO_SOCKET_IFNAME=weft0"]
    result = mpirun(1, *settings, sys.executable, SCRIPTS / "train.py", path)
    assert result.status == 0, result.err
    check(path, alone, ranks=2)


PLACE = (
    "import os, socket, sys; from torchweft.builtin.launchers.detect_mpi import starter_of; "
    "place = starter_of(os.environ).place(os.environ); "
    "print(socket.gethostname(), place.node_rank, place.local_rank, "
    "file=open(f'{sys.argv[1]}/{place.rank}', 'w'))"
)


def test_ranks_know_their_node(mpirun, tmp_path: Path) -> None:
    for number, options in enumerate(([], ["--map-by", "ppr:2:node"], ["--map-by", "slot"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        result = mpirun(2, *options, sys.executable, "-c", PLACE, folder)
        assert result.status == 0, result.err
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            "0": "first 0 0\n",
            "1": "first 0 1\n",
            "2": "second 1 0\n",
            "3": "second 1 1\n",
        }


def test_ranks_that_are_dealt_out_in_turn_are_refused(mpirun) -> None:
    plan = [sys.executable, "-m", "torchweft", "plan"]
    result = mpirun(2, "--map-by", "node", *plan)
    assert result.status != 0
    # Of ranks 1 and 2 that say so the first ends the other.
    assert re.search(
        r"error: mpirun started rank (1 of 4 as number 0|2 of 4 as number 1) of 2 on its node; "
        "torchweft takes as many ranks on every node, one node after the other: mpirun --map-by "
        "ppr:N:node",
        result.err,
    )
