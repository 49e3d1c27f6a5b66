"""Each rank's output in a file of its own, and on the terminal behind its rank."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "torchweft", "run", "--devices", "2"]
SCRIPT = """
import os, sys
from torchweft import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp")
fabric.launch()
rank = fabric.global_rank
print("step", end=" ")
print(rank)
fabric.barrier()
print(f"error of {rank}", file=sys.stderr)
os.system(f"echo child of {rank}")
print("\\r 10%\\r 20%")
sys.stdout.write("end")
if "fail" in sys.argv and rank == 1:
    raise ValueError("enough")
"""
LINES = ["step {}", "error of {}", "child of {}"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("fresh", [[], ["--no-preload"]], ids=["preloaded", "fresh"])
def test_a_file_for_each_rank_and_lines_behind_their_rank(
    fresh: list[str], script: Path, tmp_path: Path, run
) -> None:
    logs = tmp_path / "logs"
    done = run(*COMMAND, *fresh, "--log-dir", "logs", "--tee", "all", script, cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.err == ""
    for rank in (0, 1):
        shown = [line for line in done.out.splitlines() if line.startswith(f"[rank {rank}] ")]
        lines = [line.format(rank) for line in LINES]
        assert shown == [f"[rank {rank}] {line}" for line in (*lines, " 20%", "end")]
        heading, *written = (logs / f"rank-{rank}.log").read_text().splitlines()
        assert re.fullmatch(rf"--- torchweft: rank {rank}, attempt 1, \S+ \S+ ---", heading)
        assert written[:3] == lines
    # Another run is added, and the terminal shows that one alone.
    again = run(*COMMAND, *fresh, "--log-dir", logs, "--tee", "1", script)
    assert again.out.splitlines().count("[rank 1] step 1") == 1
    assert "[rank 0]" not in again.out
    assert (logs / "rank-0.log").read_text().count("step 0") == 2


def test_a_failure_is_told_behind_the_output_with_its_file(
    script: Path, tmp_path: Path, run
) -> None:
    done = run(*COMMAND, "--log-dir", tmp_path / "logs", script, "fail")
    assert done.status == 1
    assert done.out == ""
    assert "torchweft: rank 1 of 2 failed: ValueError: enough" in done.err
    assert f"\nits output: {tmp_path}/logs/rank-1.log\n" in done.err


@pytest.mark.parametrize("fresh", [[], ["--no-preload"]], ids=["preloaded", "fresh"])
def test_an_error_is_in_the_file_of_its_rank_and_told_once(
    fresh: list[str], script: Path, tmp_path: Path, run
) -> None:
    more = ["--log-dir", "logs", "--tee", "all", "--max-restarts", "1"]
    done = run(*COMMAND, *fresh, *more, script, "fail", cwd=tmp_path)
    assert done.status == 1
    first, between, second = done.err.partition(
        "torchweft: beginning anew, attempt 2 of 2 (--max-restarts)\n"
    )
    assert between, done.err
    for attempt in (first, second):
        assert attempt.startswith("torchweft: rank 1 of 2 failed: ValueError: enough\n")
        assert attempt.endswith(f"\nValueError: enough\nits output: {tmp_path}/logs/rank-1.log\n")
        assert attempt.count("ValueError: enough\n") == 2  # the headline and the traceback
    assert "enough" not in done.out
    shown = [line for line in done.out.splitlines() if line.startswith("[rank 1] ")]
    lines = [line.format(1) for line in LINES]
    assert shown == [f"[rank 1] {line}" for line in (*lines, " 20%", "end")] * 2
    attempts = (tmp_path / "logs" / "rank-1.log").read_text().split("--- torchweft: rank 1, attem")
    assert len(attempts) == 3
    for attempt in attempts[1:]:
        output, error = attempt.split("\n--- torchweft: rank 1 failed ---\n")
        assert output.endswith("\nend")
        assert error.startswith("Traceback (most recent call last):\n")
        assert error.endswith("\nValueError: enough\n")


def test_nothing_is_kept_where_no_folder_was_named(script: Path, tmp_path: Path, run) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    done = run(*COMMAND, "--tee", "0", script, environ={"TMPDIR": str(temporary)})
    assert done.out.startswith("[rank 0] step 0\n")
    assert "[rank 1]" not in done.out
    assert [name for name in os.listdir(temporary) if name.startswith("torchweft")] == []


@pytest.mark.parametrize("given", ["logs", "0,", "-1"])
def test_what_is_no_list_of_ranks(given: str, script: Path, run) -> None:
    done = run(*COMMAND, f"--tee={given}", script)
    assert done.status == 2
    assert (
        f"--tee takes ranks as in '0,2', or 'all'; it was given '{given}'. The folder for the "
        "files is --log-dir"
    ) in done.err
