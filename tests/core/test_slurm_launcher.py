"""The rank that SLURM's variables describe, and where it meets the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.core.fresh_python import python
from tests.core.test_slurm_step import TASK

from torchweft.api import RankInfo
from torchweft.builtin.launchers.meeting_point import PORTS
from torchweft.builtin.launchers.slurm import Slurm, threads

#: Two tasks on one node.
PAIR = {
    **TASK,
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_NODEID": "0",
}


def test_who_this_is() -> None:
    assert Slurm().rank({**TASK, "SLURM_RESTART_COUNT": "1"}) == RankInfo(
        rank=3,
        world_size=4,
        local_rank=1,
        local_world_size=2,
        node_rank=1,
        run_id="slurm-12.3",
        restart=1,
    )


def test_ranks_are_counted_node_by_node_however_tasks_were_dealt_out() -> None:
    """As under --distribution=cyclic, where SLURM's number of that task is 1."""
    dealt = {"SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}
    assert Slurm().rank({**TASK, **dealt}).rank == 2


def test_ranks_of_one_node_meet_on_loopback() -> None:
    launcher = Slurm()
    point = launcher.meeting_point(launcher.rank(PAIR), PAIR)
    assert point.address == "127.0.0.1"
    assert point.port in PORTS


def test_those_of_several_meet_at_the_first_node_of_the_step() -> None:
    launcher = Slurm()
    point = launcher.meeting_point(launcher.rank(TASK), TASK)
    assert point.address == "n1"
    assert (
        point.address_from == f"the first node of SLURM_STEP_NODELIST={TASK['SLURM_STEP_NODELIST']}"
    )


def test_ports_of_steps_and_jobs_that_may_run_at_once_differ() -> None:
    launcher = Slurm()
    said = [
        {**PAIR, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        for job in (1, 2, 3, 15999, 16002)
        for step in (0, 1, 2)
    ]
    ports = [launcher.meeting_point(launcher.rank(e), e).port for e in said]
    assert set(ports) < set(PORTS)
    assert len(set(ports)) == len(said)


def test_a_port_is_below_those_of_outgoing_connections() -> None:
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not limits.exists():
        pytest.skip("this system does not tell the ports of outgoing connections")
    assert PORTS[-1] < int(limits.read_text().split()[0])


# -- in the process ----------------------------------------------------------------------------

ENTER = """
import os, sys, torch
from torchweft import Fabric
fabric = Fabric(accelerator="cpu", strategy="single_device")
fabric.launch()
print(torch.get_num_threads(), os.environ["OMP_NUM_THREADS"])
print(*(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
print(Fabric(accelerator="cpu").plan.launcher.name)
print(os.popen(f"{sys.executable} -m torchweft plan --accelerator cpu | head -n 1").read(), end="")
"""
ONE = {
    **PAIR,
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_LOCALID": "0",
    "SLURM_PROCID": "0",
    # There is no such process here, as in a container.
    "SLURM_TASK_PID": "99999999",
    "SLURM_CPUS_PER_TASK": "1",
    "OMP_NUM_THREADS": None,
}


def test_a_rank_enters() -> None:
    done = python(ENTER, environ=ONE)
    # What a rank starts is no rank.
    assert done.stdout.splitlines() == [
        "1 1",
        "0 1 0 1",
        "slurm",
        "single_device on 1 x cpu, 32-true, launched by inline",
    ], done.stderr


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "64"}, 3),
        ({"SLURM_CPUS_ON_NODE": "10"}, 5),
        ({"SLURM_CPUS_ON_NODE": "1"}, 1),
        # Bound to fewer than that.
        ({"SLURM_CPUS_ON_NODE": "64"}, 8),
        ({"SLURM_CPUS_PER_TASK": "16"}, 8),
        ({}, 4),
    ],
)
def test_a_ranks_part_of_the_processors(given: dict[str, str], count: int) -> None:
    assert threads(given, ranks=2, most=8) == count
