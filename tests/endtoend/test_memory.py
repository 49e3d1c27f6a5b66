"""A rank that the kernel ends because memory ran out, in a control group that has little."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
import torch
from torchweft import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
fabric.launch()
if fabric.global_rank == 1:
    with open(sys.argv[1], "w") as group:
        group.write(str(os.getpid()))
    held = [torch.ones(2**24) for _ in range(100)]
fabric.barrier()
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of 600 MiB; the file that takes a process in."""
    version_1 = Path("/sys/fs/cgroup/memory")
    parent = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    folder = parent / f"torchweft-{os.getpid()}"
    limit = "memory.limit_in_bytes" if version_1.is_dir() else "memory.max"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(600 * 2**20))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield folder / "cgroup.procs"
    folder.rmdir()


@pytest.mark.parametrize(
    "command",
    [[sys.executable], [sys.executable, "-m", "torchweft", "run", "--devices", "2"]],
    ids=["python", "torchweft run"],
)
def test_it_is_told_why(command: list[str], group: Path, run, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run(*command, script, group)
    assert done.status == 137
    first, where, why = done.err.splitlines()[:3]
    assert first == "torchweft: rank 1 of 2 failed: killed by signal 9 (SIGKILL)"
    assert where.startswith("on ")
    assert why.startswith("memory ran out: the kernel has ended a process of this computer since")
