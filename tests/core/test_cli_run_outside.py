"""``torchweft run`` in processes that a launcher outside made; on a real SLURM in tests/slurm."""

from __future__ import annotations

import os

import pytest
from tests.core.test_slurm_step import TASK

from torchweft.catalog import Catalog
from torchweft.cli.run import check_outside
from torchweft.errors import InvalidRequest
from torchweft.manager import Manager
from torchweft.request import RunRequest


def check(monkeypatch: pytest.MonkeyPatch, tasks: int, num_nodes: int | str | None) -> None:
    said = {
        **TASK,
        "SLURM_TASK_PID": str(os.getpid()),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{tasks})",
        "SLURM_NODEID": "0",
        "SLURM_LOCALID": "0",
    }
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    catalog = Catalog(Manager.from_entry_points({}).declared)
    check_outside(RunRequest.parse(devices=2, num_nodes=num_nodes), catalog)


@pytest.mark.parametrize(
    ("tasks", "num_nodes"),
    # A lone task may be one node of several.
    [(1, None), (1, 2), (3, 3), (3, "2:4")],
)
def test_one_agent_on_each_node(
    monkeypatch: pytest.MonkeyPatch, tasks: int, num_nodes: int | str | None
) -> None:
    check(monkeypatch, tasks, num_nodes)


@pytest.mark.parametrize(
    ("num_nodes", "said"), [(None, "1"), (2, "2"), ("1:2", "1:2"), ("4:5", "4:5")]
)
def test_more_or_fewer_agents_than_nodes(
    monkeypatch: pytest.MonkeyPatch, num_nodes: int | str | None, said: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check(monkeypatch, 3, num_nodes)
    assert str(raised.value) == (
        f"--devices makes a node of this process, of {said} in all (--num-nodes), but srun started "
        "3 task(s), which would make 3 nodes; leave --devices out, and each of them is a rank, or "
        "start one on each node and give --num-nodes"
    )


POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "PET_NPROC_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("pod", "num_nodes"),
    [
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "a-0"}, 2),
        ({"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "a-0:29400"}, "1:4"),
    ],
    ids=["fixed", "elastic"],
)
def test_the_command_that_a_pod_is_told_to_start(
    monkeypatch: pytest.MonkeyPatch, pod: dict[str, str], num_nodes: int | str
) -> None:
    """What python alone cannot be there, this command can."""
    for name, value in {**POD, **pod}.items():
        monkeypatch.setenv(name, value)
    catalog = Catalog(Manager.from_entry_points({}).declared)
    check_outside(RunRequest.parse(devices=4, num_nodes=num_nodes), catalog)


def test_where_nobody_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(Manager.from_entry_points({}).declared)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    check_outside(RunRequest.parse(devices=2), catalog)
