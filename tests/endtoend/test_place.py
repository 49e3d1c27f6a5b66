"""A rank of ``torchweft run`` is the same place as ``python train.py``."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.endtoend.commands import SCRIPTS, Result, clean_environment

SCRIPT = SCRIPTS / "rank.py"
RUN = [sys.executable, "-m", "torchweft", "run"]

KINDS = pytest.mark.parametrize("kind", [[], ["--no-preload"]], ids=["preload", "fresh"])


def answers(result: Result) -> dict[int, Any]:
    assert result.status == 0, result.err
    return dict(json.loads(line) for line in result.lines)


@KINDS
def test_argv_and_path(kind: list[str], run, tmp_path: Path) -> None:
    result = run(
        *RUN,
        *kind,
        "--devices",
        "2",
        SCRIPT,
        "argv",
        "--lr",
        "0.1",
        "--",
        "--devices",
        "9",
        cwd=tmp_path,
    )
    expected = [
        [str(SCRIPT), "argv", "--lr", "0.1", "--devices", "9"],
        str(SCRIPT.parent),
        "__main__",
        "rank.py",
        str(tmp_path),
    ]
    assert answers(result) == {0: expected, 1: expected}


@KINDS
def test_imports_beside_the_script(kind: list[str], run, tmp_path: Path) -> None:
    result = run(*RUN, *kind, "--devices", "2", SCRIPT, "beside", cwd=tmp_path)
    assert answers(result) == {0: "found beside the script", 1: "found beside the script"}


@KINDS
def test_start_method_can_be_set(kind: list[str], run) -> None:
    result = run(*RUN, *kind, "--devices", "2", SCRIPT, "start method")
    assert answers(result) == {r: ["spawn", "MainProcess", True] for r in (0, 1)}


@KINDS
def test_processes_of_its_own(kind: list[str], run) -> None:
    assert answers(run(*RUN, *kind, "--devices", "2", SCRIPT, "spawned")) == {0: [42], 1: [42]}


@KINDS
def test_stdin_belongs_to_local_rank_0(kind: list[str], run) -> None:
    result = run(*RUN, *kind, "--devices", "2", SCRIPT, "stdin", text="typed\n")
    assert answers(result) == {0: "typed\n", 1: ""}


@KINDS
def test_threads_are_shared(kind: list[str], run) -> None:
    import torch

    each = max(1, torch.get_num_threads() // 2)
    result = run(*RUN, *kind, "--devices", "2", SCRIPT, "threads")
    assert answers(result) == {r: [each, str(each)] for r in (0, 1)}


@KINDS
def test_threads_as_the_user_says(kind: list[str], run) -> None:
    result = run(*RUN, *kind, "--devices", "2", SCRIPT, "threads", environ={"OMP_NUM_THREADS": "2"})
    assert answers(result) == {r: [2, "2"] for r in (0, 1)}


def test_threads_of_a_single_rank_are_left_alone(run) -> None:
    alone = run(sys.executable, SCRIPT, "threads")
    assert answers(run(*RUN, "--devices", "1", SCRIPT, "threads")) == answers(alone)


@KINDS
def test_variables_of_torch(kind: list[str], run) -> None:
    said = answers(run(*RUN, *kind, "--devices", "3", SCRIPT, "environment"))
    assert said == {
        r: {"RANK": str(r), "WORLD_SIZE": "3", "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": "3"}
        for r in range(3)
    }


@pytest.mark.parametrize("kind", [["--devices", "2"], ["--no-preload", "--devices", "2"], []])
def test_exit_status(kind: list[str], run, tmp_path: Path) -> None:
    script = tmp_path / "three.py"
    script.write_text("import sys\nsys.exit(3)\n")
    assert run(*RUN, *kind, script).status == 3


def test_older_form(run) -> None:
    result = run(*RUN, "model", SCRIPT, "--devices", "2", "beside")
    assert set(answers(result)) == {0, 1}


def test_without_devices_it_is_python(run, tmp_path: Path) -> None:
    result = run(*RUN, SCRIPT, "--accelerator", "cpu", "argv", "--epochs", "2", cwd=tmp_path)
    [(rank, said)] = answers(result).items()
    assert rank == 0
    assert said[0] == [str(SCRIPT), "argv", "--epochs", "2"]


@pytest.mark.parametrize("way", ["run", "launch"])
def test_breakpoint_on_local_rank_0(way: str, tmp_path: Path) -> None:
    """A debugger on a real terminal: it is asked something, answers, and goes on."""
    script = tmp_path / "stops.py"
    script.write_text(
        "import os\n"
        "from torchweft import Fabric\n"
        "fabric = Fabric(accelerator='cpu', devices=2, strategy='ddp')\n"
        "fabric.launch()\n"
        "secret = 6 * 7\n"
        "if fabric.local_rank == 0:\n"
        "    breakpoint()\n"
        "fabric.barrier()\n"
        "fabric.print('went on')\n"
    )
    start = [*RUN, "--devices", "2"] if way == "run" else [sys.executable]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [*start, str(script)],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=clean_environment({"TERM": "dumb"}),
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(inside)
    seen = ""
    try:
        seen += read_until(terminal, "(Pdb)")
        os.write(terminal, b"p secret\n")
        seen += read_until(terminal, "42")
        os.write(terminal, b"c\n")
        seen += read_until(terminal, "went on")
        assert process.wait(30) == 0, seen
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def read_until(terminal: int, words: str) -> str:
    seen, deadline = "", time.monotonic() + 60
    while words not in seen:
        left = deadline - time.monotonic()
        assert left > 0, f"{words!r} never came; the terminal shows:\n{seen}"
        if select.select([terminal], [], [], left)[0]:
            seen += os.read(terminal, 4096).decode()
    return seen
