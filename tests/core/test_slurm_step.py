"""What SLURM's variables say, as srun of SLURM 22.05 sets them."""

from __future__ import annotations

import pytest

from torchweft.builtin.launchers.slurm_step import Step
from torchweft.errors import InvalidRequest

#: Task 1 of the second node of two.
TASK = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}


def test_a_task() -> None:
    assert Step.is_described(TASK)
    assert Step.read(TASK) == Step(
        job=12,
        number=3,
        tasks=4,
        per_node=(2, 2),
        node=1,
        local_task=1,
        node_list="n[1-2]",
        restart=0,
    )


def test_a_job_that_was_put_back_into_the_queue() -> None:
    assert Step.read({**TASK, "SLURM_RESTART_COUNT": "2"}).restart == 2


@pytest.mark.parametrize(
    ("text", "counts"), [("2", (2,)), ("2(x3),1", (2, 2, 2, 1)), ("1,3(x2),1", (1, 3, 3, 1))]
)
def test_tasks_on_each_node(text: str, counts: tuple[int, ...]) -> None:
    said = {"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_STEP_NUM_TASKS": str(sum(counts))}
    place = {"SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    assert Step.read({**TASK, **said, **place}).per_node == counts


@pytest.mark.parametrize(
    "environ",
    [
        {},
        # A batch script.
        {name: value for name, value in TASK.items() if "STEP" not in name},
        # The shell of salloc on a node of the job.
        {**TASK, "SLURM_STEP_ID": "4294967290"},
        {**TASK, "SLURM_STEP_ID": ""},
        {name: value for name, value in TASK.items() if name != "SLURM_PROCID"},
    ],
)
def test_what_is_no_task(environ: dict[str, str]) -> None:
    assert not Step.is_described(environ)


@pytest.mark.parametrize(
    ("name", "value", "found", "due"),
    [
        ("SLURM_JOB_ID", "x", "is 'x'", "a number from 0"),
        ("SLURM_LOCALID", None, "is not set", "what srun sets"),
        ("SLURM_LOCALID", "2", "is '2'", "less than 2, the tasks of this node"),
        ("SLURM_NODEID", "2", "is '2'", "less than 2, the nodes"),
        ("SLURM_STEP_TASKS_PER_NODE", "2x2", "is '2x2'", "numbers such as 2(x3),1"),
        ("SLURM_STEP_TASKS_PER_NODE", "2,1", "is '2,1'", "4 tasks in all"),
        ("SLURM_STEP_NODELIST", "", "is ''", "what srun sets"),
    ],
)
def test_what_contradicts_itself(name: str, value: str | None, found: str, due: str) -> None:
    environ = {**TASK, name: value}
    with pytest.raises(InvalidRequest) as raised:
        Step.read({key: text for key, text in environ.items() if text is not None})
    assert str(raised.value) == (
        f"the environment variable {name} {found}, and {due} is due; unset SLURM_STEP_ID if this "
        "process is no task of srun"
    )
