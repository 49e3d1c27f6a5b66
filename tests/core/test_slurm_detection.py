"""Which processes are tasks of SLURM; on a real SLURM in tests/slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.core.test_slurm_step import TASK

from torchweft.builtin.launchers.detect_slurm import slurm
from torchweft.handoff import Handoff
from torchweft.specs import Detection

MINE = {**TASK, "SLURM_TASK_PID": str(os.getpid())}


def found(**variables: str) -> Detection:
    detection = slurm({**MINE, **variables})
    assert detection is not None
    return detection


def handed(**fields: Any) -> dict[str, str]:
    return Handoff(run_id="0", **fields).to_environ()


def test_a_task_of_srun() -> None:
    assert found() == Detection(
        reason="srun started 4 task(s)",
        world_size=4,
        processes_per_node=2,
        processes_hint="write '#SBATCH --ntasks-per-node={wanted}' in place of 2 (or that option "
        "of srun)",
        nodes_hint="write '#SBATCH --nodes={wanted}' in place of 2 (or that option of srun)",
        devices_hint="write '#SBATCH --gpus-per-node={wanted}' without --gpus-per-task and "
        "--gpu-bind, which hide the other devices of a node from a task",
    )


def test_not_a_batch_script_nor_the_shell_of_salloc() -> None:
    assert slurm({}) is None
    assert slurm({**MINE, "SLURM_STEP_ID": "4294967290"}) is None
    assert slurm({name: value for name, value in MINE.items() if "STEP" not in name}) is None


def test_different_numbers_of_tasks_on_the_nodes() -> None:
    many = found(SLURM_STEP_NUM_TASKS="3", SLURM_STEP_TASKS_PER_NODE="1,2")
    assert many.processes_per_node is None
    assert many.objection == (
        "not the same number on every node: 1, 2 on n[1-2]; write '#SBATCH --ntasks-per-node=2' in "
        "place of --ntasks=3 (or that option of srun)"
    )
    counts = {"SLURM_STEP_NUM_TASKS": "21", "SLURM_STEP_TASKS_PER_NODE": "2(x10),1"}
    assert "every node: 2, 2, 2, 2, 2, 2, 2, 2, … on" in found(**counts).objection


def test_variables_that_contradict_each_other_matter_only_if_nobody_is_nearer() -> None:
    odd = found(SLURM_LOCALID="7")
    assert (odd.reason, odd.world_size) == ("srun started this process", None)
    assert odd.objection.startswith("the environment variable SLURM_LOCALID is '7', and less than")


def test_flags_of_the_command_change_nothing() -> None:
    assert found(**handed(pid=os.getpid(), flags={"strategy": "ddp"})).world_size == 4


def test_a_rank_of_slurm_is_still_one() -> None:
    assert found(**handed(pid=os.getpid(), launcher="slurm")).world_size == 4


@pytest.mark.parametrize("launcher", ["torchrun", "script", "fork"])
def test_not_a_rank_that_another_launcher_made(launcher: str) -> None:
    # The first rank may well be the task itself, as one that ran the command again is.
    assert slurm({**MINE, **handed(pid=os.getpid(), launcher=launcher)}) is None


def test_not_a_program_that_a_rank_started() -> None:
    other = {**TASK, "SLURM_TASK_PID": str(os.getppid())}
    assert slurm({**other, **handed(pid=os.getppid(), launcher="slurm")}) is None


def test_the_task_itself_whatever_was_exported_when_the_job_was_submitted() -> None:
    assert found(**handed(pid=1, launcher="torchrun")).world_size == 4


# -- by hand -----------------------------------------------------------------------------------

#: What a program below a task finds out about itself.
ASK = """
import os
from torchweft.builtin.launchers.detect_slurm import slurm
print("a task" if slurm(os.environ) else "by hand", flush=True)
"""
#: The task, a shell that has started its own session, as SLURM starts them.
SHELL = "export SLURM_TASK_PID=$$; {command}; true"


@pytest.fixture
def ask(tmp_path: Path) -> str:
    """The command that asks."""
    (tmp_path / "ask.py").write_text(ASK)
    return f"{sys.executable} {tmp_path / 'ask.py'}"


@pytest.mark.parametrize(
    ("below", "what"),
    [
        ("{ask}", "a task"),
        ("sh -c '{ask}; true'", "a task"),
        ("exec {ask}", "a task"),
        # As the kernel of a notebook is started, and what runs in a terminal multiplexer.
        ("setsid -w {ask}", "by hand"),
        # As in a container, where the number means another process or none.
        ("SLURM_TASK_PID=99999999 {ask}", "a task"),
        ("SLURM_TASK_PID= {ask}", "a task"),
    ],
)
def test_below_a_task(below: str, what: str, ask: str) -> None:
    done = subprocess.run(
        ["sh", "-c", SHELL.format(command=below.format(ask=ask))],
        env={**os.environ, **TASK},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"{what}\n"


@pytest.mark.parametrize(("below", "what"), [("{ask}", "by hand"), ("exec {ask}", "a task")])
def test_in_the_terminal_of_a_task(below: str, what: str, ask: str) -> None:
    if shutil.which("script") is None:
        pytest.skip("script, which opens a terminal, is not installed (bsdutils)")
    done = subprocess.run(
        ["script", "-qec", SHELL.format(command=below.format(ask=ask)), "/dev/null"],
        env={**os.environ, **TASK, "SHELL": "/bin/sh"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split("\n")[-2:] == [what, ""]
