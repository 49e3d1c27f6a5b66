from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchweft.process import read_stacks, stacks_file
from torchweft.process.stacks import Stacks

RANK = """
import os, sys, time, threading, multiprocessing
from torchweft import process
process.tell_stacks()
def other():
    time.sleep(60)
def step():
    open(os.environ["READY"], "w").close()
    {body}
threading.Thread(target=other, daemon=True).start()
step()
"""


def ended(tmp_path: Path, body: str, number: int) -> tuple[int, Path]:
    script = tmp_path / "train.py"
    script.write_text(RANK.format(body=body))
    error_file = tmp_path / "error.json"
    environ = {
        "TORCHELASTIC_ERROR_FILE": str(error_file),
        "RANK": "3",
        "READY": str(tmp_path / "ready"),
        "PATH": "/usr/bin:/bin",
    }
    rank = subprocess.Popen(
        [sys.executable, str(script)],
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "ready").exists():
        assert rank.poll() is None, rank.communicate()[1]
        time.sleep(0.01)
    time.sleep(0.1)
    rank.send_signal(number)
    rank.communicate(timeout=60)
    return rank.returncode, error_file


def test_a_rank_tells_where_it_was_when_it_was_told_to_end(tmp_path: Path) -> None:
    status, file = ended(tmp_path, "threading.Event().wait()", signal.SIGTERM)
    assert status == -signal.SIGTERM
    stacks = read_stacks(file)
    assert stacks is not None
    assert (stacks.rank, stacks.pid > 0, bool(stacks.host)) == (3, True, True)
    # The main thread, not the other one.
    assert stacks.doing() == "train.py:9 in step, in wait"
    assert "in other" in stacks.text


def test_a_rank_that_crashes_leaves_its_stacks(tmp_path: Path) -> None:
    status, file = ended(tmp_path, "threading.Event().wait()", signal.SIGSEGV)
    assert status == -signal.SIGSEGV
    stacks = read_stacks(file)
    assert stacks is not None
    assert stacks.text.startswith("Fatal Python error: Segmentation fault")
    assert "Extension modules" not in stacks.text


def test_a_second_fabric_changes_nothing(tmp_path: Path) -> None:
    count = "len(os.listdir('/proc/self/fd'))"
    again = f"before = {count}; process.tell_stacks(); os._exit({count} - before)"
    status, file = ended(tmp_path, again, 0)
    assert status == 0
    stacks = read_stacks(file)
    assert stacks is not None
    assert stacks.rank == 3


def test_the_end_of_its_children_is_not_told(tmp_path: Path) -> None:
    child = (
        "pid = os.fork()\n    if pid == 0: time.sleep(60)\n    time.sleep(1); os.kill(pid, 15); "
        "os.waitpid(pid, 0); os._exit(7)"
    )
    status, file = ended(tmp_path, child, 0)
    assert status == 7
    stacks = read_stacks(file)
    assert stacks is not None
    assert (stacks.text, stacks.doing()) == ("", "")


def test_a_rank_that_is_killed_leaves_its_place(tmp_path: Path) -> None:
    status, file = ended(tmp_path, "time.sleep(60)", signal.SIGKILL)
    assert status == -signal.SIGKILL
    stacks = read_stacks(file)
    assert stacks is not None
    assert (stacks.rank, stacks.text) == (3, "")


@pytest.mark.parametrize("content", [None, "", "[]", '{"rank": 1}', '{"rank": "x"}\n'])
def test_nothing_is_read_from_what_no_rank_wrote(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        stacks_file(tmp_path / "error.json").write_text(content)
    assert read_stacks(tmp_path / "error.json") is None


@pytest.mark.parametrize(
    ("frames", "doing"),
    [
        ([("/home/me/train.py", 4, "step")], "train.py:4 in step"),
        (
            [
                ("<lib>/torch/distributed/distributed_c10d.py", 9, "all_reduce"),
                ("<lib>/torch/distributed/c10d_logger.py", 9, "wrapper"),
                ("/home/me/train.py", 4, "step"),
            ],
            "train.py:4 in step, in all_reduce",
        ),
        (
            [
                ("<lib>/torch/autograd/graph.py", 9, "_engine_run_backward"),
                ("<lib>/torch/_tensor.py", 9, "backward"),
                ("/home/me/train.py", 4, "<module>"),
            ],
            "train.py:4 in <module>, in backward",
        ),
        ([("<lib>/torch/a.py", 9, "_b")], "a.py:9 in _b"),
        ([], ""),
    ],
)
def test_what_a_rank_was_doing(frames: list[tuple[str, int, str]], doing: str) -> None:
    library = next(path for path in sys.path if path.endswith("site-packages"))
    lines = [
        f'  File "{file.replace("<lib>", library)}", line {line} in {name}'
        for file, line, name in frames
    ]
    text = "\n".join(["Current thread 0x1 [python] (most recent call first):", *lines])
    stacks = Stacks(rank=0, host="here", pid=1, text=text)
    assert stacks.doing() == doing
