"""A rank is the same place as ``python train.py``, whoever made it, and ends as that does."""

from __future__ import annotations

import gzip
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
import torch

from tests.endtoend.commands import SCRIPTS, clean_environment, ways

SCRIPT = SCRIPTS / "place.py"
RUN = [sys.executable, "-m", "torchweft", "run"]

SCRIPT_WAYS = ["python", "again", "torchweft run", "no preload", "torchrun"]
FUNCTION_WAYS = ["fork", "spawn", "forkserver"]

#: What every rank has in common with a process that was started by hand.
SAME = ("process", "workers", "pool")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script sees in ``python place.py`` without any other process."""
    folder = tmp_path_factory.mktemp("alone")
    subprocess.run(
        [sys.executable, SCRIPT, folder, "script", "--lr", "0.1", "--devices", "9"],
        env=clean_environment({"DEVICES": "1"}),
        input="typed\n",
        text=True,
        cwd=folder,
        check=True,
        timeout=90,
    )
    return json.loads((folder / "said-0").read_text())


def start(way: str, folder: Path) -> list[str | Path]:
    how = "script" if way in ("python", "torchweft run", "no preload", "torchrun") else way
    command = ways(SCRIPT).get(way, [sys.executable, str(SCRIPT)])
    stop = ["--"] if "torchweft" in command else []
    return [*command, folder, how, "--lr", "0.1", *stop, "--devices", "9"]


@pytest.mark.parametrize("way", [*SCRIPT_WAYS, *FUNCTION_WAYS])
def test_the_same_place(way: str, run, alone: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "said"
    folder.mkdir()
    outside = way in ("torchweft run", "no preload", "torchrun")
    environ = {"PYTHONUNBUFFERED": "", **({} if outside else {"DEVICES": "2"})}
    result = run(*start(way, folder), environ=environ, text="typed\n", cwd=tmp_path)
    assert result.status == 0, result.err
    ranks = [json.loads((folder / f"said-{rank}").read_text()) for rank in (0, 1)]
    for rank, said in enumerate(ranks):
        assert said["rank"] == [rank, 2, str(rank), "2"]
        assert {name: said[name] for name in SAME} == {name: alone[name] for name in SAME}
        check_main(said["main"], alone["main"], way, folder, tmp_path)
        each = max(1, torch.get_num_threads() // 2)
        assert said["threads"] == [each, str(each)]
        check_end(folder, rank, said)
    if way != "torchrun":  # which gives everybody what it has
        assert [said["stdin"] for said in ranks] == [["typed\n", ""], ["", ""]]
    # Nothing is lost of what was printed, and nothing printed twice.
    assert sorted(result.lines) == ["library 0", "library 1", "python 0", "python 1"]
    if way not in ("again", "torchrun"):  # which say what they do
        assert result.err == ""


def check_main(
    said: dict[str, Any], alone: dict[str, Any], way: str, folder: Path, cwd: Path
) -> None:
    expected = dict(alone)
    how = alone["argv"][2] if way in ("python", "torchweft run", "no preload", "torchrun") else way
    expected["argv"] = [str(SCRIPT), str(folder), how, "--lr", "0.1", "--devices", "9"]
    expected["folder"] = str(cwd)
    if way in ("spawn", "forkserver"):
        # multiprocessing imports the program there, and leaves these as an import does.
        for name in ("names", "package", "loader"):
            del expected[name]
    assert {name: said[name] for name in expected} == expected


def check_end(folder: Path, rank: int, said: dict[str, Any]) -> None:
    order = (folder / f"order-{rank}").read_text().split("\n")
    assert order == ["thread", "second registered", "first registered", ""]
    assert (folder / f"text-{rank}").read_text() == "held in memory"
    assert gzip.decompress((folder / f"packed-{rank}").read_bytes()) == b"held in memory"
    assert (folder / f"log-{rank}").read_text() == "held in memory\n"
    assert [name for name in said["temporary"] if os.path.exists(name)] == []


def test_one_process_ends_as_python_does(run, tmp_path: Path) -> None:
    result = run(sys.executable, SCRIPT, tmp_path, environ={"DEVICES": "1"}, text="")
    assert result.status == 0, result.err
    check_end(tmp_path, 0, json.loads((tmp_path / "said-0").read_text()))


def test_threads_as_the_user_says_and_the_older_form(run, tmp_path: Path) -> None:
    environ = {"OMP_NUM_THREADS": "2"}
    result = run(*RUN, "model", SCRIPT, "--devices", "2", tmp_path, environ=environ)
    assert result.status == 0, result.err
    for rank in (0, 1):
        assert json.loads((tmp_path / f"said-{rank}").read_text())["threads"] == [2, "2"]


def test_threads_of_a_single_rank_are_left_alone(
    run, alone: dict[str, Any], tmp_path: Path
) -> None:
    result = run(*RUN, "--devices", "1", SCRIPT, tmp_path)
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "said-0").read_text())["threads"] == alone["threads"]


def test_without_devices_it_is_python(run, alone: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "says.py"
    script.write_text("import sys, os\nprint(sys.argv, sys.warnoptions, os.getpid())\n")
    command = [sys.executable, "-W", "error", "-m", "torchweft", "run"]
    result = run(*command, script, "--accelerator", "cpu", "--epochs", "2")
    assert result.status == 0, result.err
    assert result.out.startswith(f"['{script}', '--epochs', '2'] ['error'] ")


SHADOW = "raise SystemExit('the wrong file was imported')\n"


@pytest.mark.parametrize("kind", [[], ["--no-preload"]], ids=["preload", "fresh"])
def test_files_in_the_current_folder_hide_nothing(kind: list[str], run, tmp_path: Path) -> None:
    """Only the script's own folder is searched before the libraries."""
    (tmp_path / "src").mkdir()
    script = tmp_path / "src" / "train.py"
    script.write_text("import secrets, colorsys, torch\nprint('fine')\n")
    for name in ("secrets", "colorsys", "torch", "queue"):
        (tmp_path / f"{name}.py").write_text(SHADOW)
    command = [Path(sys.executable).parent / "torchweft", "run", *kind, "--devices", "2"]
    result = run(*command, script, cwd=tmp_path)
    assert result.status == 0, result.err
    assert result.lines == ["fine", "fine"]


@pytest.mark.parametrize("kind", [["--devices", "2"], ["--no-preload", "--devices", "2"], []])
def test_exit_status(kind: list[str], run, tmp_path: Path) -> None:
    script = tmp_path / "three.py"
    script.write_text("import sys\nsys.exit(3)\n")
    assert run(*RUN, *kind, script).status == 3


@pytest.mark.parametrize("way", ["run", "launch", "spawn"])
def test_breakpoint_on_local_rank_0(way: str, tmp_path: Path) -> None:
    """A debugger on a real terminal: it is asked something, answers, and goes on."""
    script = tmp_path / "stops.py"
    script.write_text(
        "from torchweft import Fabric\n"
        "def train(fabric):\n"
        "    secret = 6 * 7\n"
        "    if fabric.local_rank == 0:\n"
        "        breakpoint()\n"
        "    fabric.barrier()\n"
        "    fabric.print('went on')\n"
        "if __name__ == '__main__':\n"
        f"    launcher = {'spawn' if way == 'spawn' else 'auto'!r}\n"
        "    fabric = Fabric(accelerator='cpu', devices=2, strategy='ddp', launcher=launcher)\n"
        + ("    fabric.launch(train)\n" if way == "spawn" else "    fabric.launch()\n")
        + ("" if way == "spawn" else "    train(fabric)\n")
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
            try:
                seen += os.read(terminal, 4096).decode()
            except OSError:  # nobody has the terminal any more
                pytest.fail(f"{words!r} never came; the terminal has shown:\n{seen}")
    return seen
