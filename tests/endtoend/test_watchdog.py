"""A collective operation that a rank leaves out, under ``torchweft run --timeout``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "torchweft", "run", "--devices", "3", "--timeout", "1.5"]
SCRIPT = """
import sys, time
import torch
from torchweft import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp")
fabric.launch()


def train():
    model = fabric.setup_module(torch.nn.Linear(3, 3))
    for step in range(3):
        fabric.backward(model(torch.ones(2, 3)).sum())
    if fabric.global_rank == 1:
        if sys.argv[1] == "sleep":
            time.sleep(600)
        fabric.broadcast(torch.ones(7))
    fabric.all_reduce(torch.ones(5))
    time.sleep(600)


train()
"""


def line(text: str) -> int:
    return SCRIPT.splitlines().index(text) + 1


@pytest.mark.parametrize("fresh", [[], ["--no-preload"]], ids=["preloaded", "fresh"])
def test_it_says_which_and_who_did_not_come(fresh: list[str], tmp_path: Path, run) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    logs = tmp_path / "logs"
    done = run(*COMMAND, *fresh, "--log-dir", logs, script, "sleep")
    assert done.status == 1
    told = done.err.splitlines()[0]
    assert "failed: CollectiveTimeout: all_reduce of 5 Float, operation " in told
    assert (
        "took longer than 1.5 s (--timeout): rank 0, 2 came to it; rank 1 did not: it is at "
        f"train.py:{line('            time.sleep(600)')} in train, after all_reduce "
    ) in told
    assert told.endswith(f"; every rank's stacks are in {logs}")
    assert "Traceback" not in done.err
    stacks = [(logs / f"stacks-rank-{rank}.txt").read_text() for rank in range(3)]
    assert f'train.py", line {line("            time.sleep(600)")} in train' in stacks[1]
    for rank in (0, 2):
        assert f'train.py", line {line("    fabric.all_reduce(torch.ones(5))")} in' in stacks[rank]


def test_it_says_who_came_with_another_one(tmp_path: Path, run) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    # What is only shown does not stay, but for the stacks.
    done = run(*COMMAND, "--tee", "all", script, "other", environ={"TMPDIR": str(tmp_path)})
    told = done.err.splitlines()[0]
    assert "; but rank " in told
    assert "with another one: " in told
    assert "broadcast of " in told
    (folder,) = tmp_path.glob("torchweft-stacks-*")
    assert told.endswith(f"every rank's stacks are in {folder}")
    assert (folder / "stacks-rank-0.txt").exists()


def test_where_stacks_cannot_be_written(tmp_path: Path, run) -> None:
    """What goes wrong with them does not keep the run from its end."""
    script = tmp_path / "train.py"
    folder = tmp_path / "torchweft-stacks-"
    taken = f"open({str(folder)!r} + os.environ['TORCHELASTIC_RUN_ID'], 'w').close()"
    script.write_text(SCRIPT.replace("\n\n\ntrain()", f"\n\nimport os\n{taken}\n\ntrain()"))
    done = run(*COMMAND, script, "sleep", environ={"TMPDIR": str(tmp_path)})
    assert done.status == 1
    told = done.err.splitlines()[0]
    assert "rank 0, 2 came to it; rank 1 did not: it is at train.py:" in told
    assert f"; stacks could not be written to {folder}" in told
    assert told.endswith(": File exists")
    assert "Traceback" not in done.err


def test_it_knows_who_is_of_a_group(tmp_path: Path, run) -> None:
    script = tmp_path / "train.py"
    lines = [
        "import time",
        "import torch, torch.distributed as dist",
        "from torchweft import Fabric",
        "fabric = Fabric(accelerator='cpu', strategy='ddp')",
        "fabric.launch()",
        "others = dist.new_group([1])",
        "group = dist.new_group([0, 2])",
        "if fabric.global_rank == 0:",
        "    dist.all_reduce(torch.ones(5), group=group)",
        "time.sleep(600)",
    ]
    script.write_text("\n".join(lines))
    done = run(*COMMAND, "--log-dir", tmp_path, script)
    assert done.err.splitlines()[0] == (
        "torchweft: rank 0 of 3 failed: CollectiveTimeout: all_reduce of 5 Float, operation 1 in "
        "the group of rank 0, 2, took longer than 1.5 s (--timeout): rank 0 came to it; rank 2 did "
        "not: it is at train.py:10 in <module>, in none of its group; every rank's stacks are in "
        f"{tmp_path}"
    )
