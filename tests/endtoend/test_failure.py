"""However a rank or its supervisor ends: the rest is stopped, it is told once, nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.endtoend.commands import SCRIPTS, Command, Result, ways

SCRIPT = SCRIPTS / "fail.py"

#: Those in which the script's own launch() makes the processes, then torch's agent, then functions.
ALONE = ["python", "again"]
AGENT = ["torchweft run", "no preload"]
FUNCTION = ["fork", "spawn", "forkserver"]

STATUS = {"raise": 1, "kill": 137, "exit": 3, "os._exit": 4}
CAUSE = {
    "raise": "ValueError: rank one has had enough",
    "kill": "killed by signal 9 (SIGKILL)",
    "exit": "ended with exit status 3",
    "os._exit": "ended with exit status 4",
}


@pytest.fixture
def fail(start: Callable[..., Command], tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start the script; nothing of ours may be left in the folder for temporary files."""
    # A short name: multiprocessing's server has a socket in it, whose path may have 108 bytes.
    temporary = Path(tempfile.mkdtemp(prefix="tw-"))
    (tmp_path / "temporary").symlink_to(temporary)

    def begin(way: str, how: str) -> Command:
        environ = {"TMPDIR": str(temporary)}
        command = ways(SCRIPT).get(way, [sys.executable, str(SCRIPT)])
        if way not in AGENT:
            environ["DEVICES"] = "2"
        launcher = [] if way in ("python", *AGENT) else [way]
        return start(*command, how, tmp_path, *launcher, environ=environ)

    yield begin
    shutil.rmtree(temporary, ignore_errors=True)


def leftovers(tmp_path: Path) -> list[str]:
    """What torch makes for its compiler is not ours."""
    names = [path.name for path in (tmp_path / "temporary").iterdir()]
    return [name for name in names if not name.startswith("torchinductor")]


def until_ready(command: Command, tmp_path: Path) -> None:
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        assert command.popen.poll() is None, command.finish().err
        time.sleep(0.02)


def check(result: Result, way: str, how: str, tmp_path: Path) -> None:
    since = time.time() - float((tmp_path / "time").read_text())
    told = f"rank 1 of 2 failed: {CAUSE[how]}"
    if way in FUNCTION:
        assert result.status == 1
        assert f"torchweft.errors.RankFailed: {told}" in result.err
        # Once in the rank's own words; the other traceback is that of fabric.launch() here.
        assert result.err.count("in end\n") == (how == "raise")
    else:
        assert result.status == STATUS[how], result.err
        assert f"torchweft: {told}" in result.err
        assert result.err.count("Traceback (most recent call last)") == (how == "raise")
    if how == "raise" and way not in FUNCTION:
        # The user's own frames, and none of ours before them.
        first = result.err.split("Traceback (most recent call last):\n")[1].splitlines()[0]
        assert "fail.py" in first
    assert leftovers(tmp_path) == []
    # Rank 0 would have slept for ten minutes, and minds no signal that can be minded.
    print(f"{since:.2f} s from the failure to the end")


@pytest.mark.parametrize("way", [*ALONE, *AGENT, *FUNCTION])
def test_a_rank_raises(way: str, fail, tmp_path: Path) -> None:
    check(fail(way, "raise").finish(), way, "raise", tmp_path)


@pytest.mark.parametrize("way", ["python", *AGENT, "spawn"])
def test_a_rank_is_killed(way: str, fail, tmp_path: Path) -> None:
    check(fail(way, "kill").finish(), way, "kill", tmp_path)


@pytest.mark.parametrize("how", ["exit", "os._exit"])
@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_a_rank_exits(way: str, how: str, fail, tmp_path: Path) -> None:
    check(fail(way, how).finish(), way, how, tmp_path)


@pytest.mark.parametrize("way", ["python", *AGENT, "forkserver"])
def test_ranks_that_vanish_with_status_0(way: str, fail, tmp_path: Path) -> None:
    """``os._exit(0)`` returns from nothing, and is an end like any other."""
    result = fail(way, "zero").finish()
    assert (result.status, result.err) == (0, "")
    assert result.out == ("returned None\n" if way == "forkserver" else "")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_a_rank_that_ends_well_while_others_wait_for_it(way: str, fail, tmp_path: Path) -> None:
    result = fail(way, "early").finish()
    assert result.status == 1
    assert result.err.startswith(
        "torchweft: rank 0 of 2 lost rank 1, which was done, without an error; every rank has to "
        "take part in every collective operation\n"
    )
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("way", ["python", *AGENT, "spawn"])
def test_the_supervisor_is_told_to_end(way: str, fail, tmp_path: Path) -> None:
    """SIGTERM is passed on, and a rank that saves what it has is given the time."""
    command = fail(way, "save")
    until_ready(command, tmp_path)
    command.popen.terminate()
    result = command.finish()
    # A function's caller ends as if it had no ranks: by the signal.
    assert result.status == (-signal.SIGTERM if way == "spawn" else 143), result.err
    assert (tmp_path / "saved-0").exists()
    assert result.err == ""
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("way", [*ALONE, *AGENT, "forkserver"])
def test_the_supervisor_is_killed(way: str, fail, tmp_path: Path) -> None:
    command = fail(way, "sleep")
    until_ready(command, tmp_path)
    command.popen.kill()
    command.popen.wait()
    assert command.left() == []


@pytest.mark.parametrize("way", ["python", "torchweft run", "fork"])
def test_interrupt(way: str, fail, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of a terminal; each may finish what it does about it."""
    command = fail(way, "sleep")
    until_ready(command, tmp_path)
    os.killpg(command.popen.pid, signal.SIGINT)
    result = command.finish()
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))
    if way == "fork":
        assert result.status == -signal.SIGINT
        assert result.err.count("KeyboardInterrupt") == 1
    else:
        assert result.status == 130
        assert result.err == ""
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_nohup(way: str, start, tmp_path: Path) -> None:
    """A hangup that is ignored from the beginning ends nobody."""
    command = start("nohup", *ways(SCRIPT)[way], "sleep", tmp_path, environ={"DEVICES": "2"})
    until_ready(command, tmp_path)
    os.killpg(command.popen.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert command.popen.poll() is None
    command.popen.terminate()
    assert command.finish().status == 143


def test_an_error_before_the_group_exists(start, tmp_path: Path) -> None:
    """It is the supervisor's to tell from the moment at which there are ranks."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, threading\n"
        "from torchweft import Fabric\n"
        "from torchweft_cuda.ddp import DDPStrategy\n"
        "class Broken(DDPStrategy):\n"
        "    def start(self, place):\n"
        "        raise OSError('no such network')\n"
        "if len(sys.argv) > 1:\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "Fabric(accelerator='cpu', devices=2, strategy=Broken()).launch()\n"
    )
    for arguments in ([], ["again"]):
        result = start(sys.executable, script, *arguments).finish()
        assert result.status == 1
        assert result.err.count("Traceback") == 1
        assert " of 2 failed: OSError: no such network" in result.err


@pytest.mark.parametrize("way", ["python", *AGENT])
def test_a_rank_crashes(way: str, start, tmp_path: Path) -> None:
    """Where its Python code was is told in the report, once."""
    script = tmp_path / "crash.py"
    script.write_text(
        "import ctypes, os\n"
        "from torchweft import Fabric\n"
        "fabric = Fabric(accelerator='cpu', devices=2)\n"
        "fabric.launch()\n"
        "if fabric.global_rank == 1:\n"
        "    ctypes.string_at(0)\n"
        "fabric.barrier()\n"
    )
    result = start(*ways(script)[way], environ={"PYTHONFAULTHANDLER": ""}).finish()
    assert result.status == 128 + signal.SIGSEGV
    assert result.err.startswith("torchweft: rank 1 of 2 failed: killed by signal 11 (SIGSEGV)\n")
    assert result.err.count("Fatal Python error: Segmentation fault\n") == 1
    assert 'crash.py", line 6 in <module>\n' in result.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("seconds", [0.4, 0.8, 1.2])
def test_the_command_is_told_to_end_while_it_begins(
    number: int, seconds: float, start, tmp_path: Path
) -> None:
    """Also in the middle of an import, which tells nobody of it."""
    command = start(
        *ways(SCRIPT)["torchweft run"], "sleep", tmp_path, environ={"TMPDIR": str(tmp_path)}
    )
    time.sleep(seconds)
    os.killpg(command.popen.pid, number)
    result = command.finish()
    assert (result.status, result.err) == (128 + number, "")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("pymp-")] == []
