"""One rank ends badly: the others are stopped, the cause is told once, nothing is left."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.endtoend.commands import SCRIPTS, Result, ways

SCRIPT = SCRIPTS / "fail.py"

STATUS = {"raise": 1, "kill": 137, "exit": 3, "os._exit": 4}
CAUSE = {
    "raise": "ValueError: rank one has had enough",
    "kill": "killed by signal 9 (SIGKILL)",
    "exit": "ended with exit status 3",
    "os._exit": "ended with exit status 4",
}


def check(result: Result, how: str, folder: Path) -> None:
    ended = time.time()
    assert result.status == STATUS[how], result.err
    assert f"torchweft: rank 1 of 2 failed: {CAUSE[how]}" in result.err
    assert result.err.count("Traceback (most recent call last)") == (how == "raise")
    if how == "raise":
        # The user's own frames, and none of ours before them.
        first = result.err.split("Traceback (most recent call last):\n")[1].splitlines()[0]
        assert "fail.py" in first
    # Rank 0 would have slept for ten minutes.
    print(
        f"{how}: {ended - float((folder / 'time').read_text()):.2f} s from the failure to the end"
    )


@pytest.mark.parametrize("how", ["raise", "kill", "exit", "os._exit"])
@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_script(way: str, how: str, run, tmp_path: Path) -> None:
    environ = {"DEVICES": "2"} if way == "python" else {}
    result = run(*ways(SCRIPT)[way], how, tmp_path, environ=environ)
    check(result, how, tmp_path)


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_no_preload(how: str, run, tmp_path: Path) -> None:
    check(run(*ways(SCRIPT)["no preload"], how, tmp_path), how, tmp_path)


@pytest.mark.parametrize("how", ["raise", "kill"])
@pytest.mark.parametrize("launcher", ["fork", "spawn", "forkserver"])
def test_function(launcher: str, how: str, run, tmp_path: Path) -> None:
    result = run(sys.executable, SCRIPT, how, tmp_path, launcher, environ={"DEVICES": "2"})
    assert result.status == 1
    assert f"torchweft.errors.RankFailed: rank 1 of 2 failed: {CAUSE[how]}" in result.err
    # Once in the rank's own words; the other traceback is that of fabric.launch() here.
    assert result.err.count("in end\n") == (how == "raise")


@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_interrupt(way: str, start, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of a terminal."""
    import os
    import signal

    environ = {"DEVICES": "2"} if way == "python" else {}
    command = start(*ways(SCRIPT)[way], "sleep", tmp_path, environ=environ)
    while not (tmp_path / "pid-0").exists():
        assert command.popen.poll() is None
        time.sleep(0.05)
    os.killpg(command.popen.pid, signal.SIGINT)
    result = command.finish()
    assert result.status == 130
    assert "Traceback" not in result.err


@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_supervisor_killed(way: str, start, tmp_path: Path) -> None:
    """Ranks do not outlive a supervisor that was killed (the fixture looks for them)."""
    import os
    import signal

    environ = {"DEVICES": "2"} if way == "python" else {}
    command = start(*ways(SCRIPT)[way], "sleep", tmp_path, environ=environ)
    while not (tmp_path / "pid-0").exists():
        assert command.popen.poll() is None
        time.sleep(0.05)
    os.kill(command.popen.pid, signal.SIGKILL)
    command.popen.wait()
    assert command.left() == []
