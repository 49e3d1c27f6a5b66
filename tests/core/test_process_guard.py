"""A guard ends as its rank ends, passes signals on, and outlives nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torchweft.process import Marks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are guarded on Linux")

GUARD = """
import os, signal, sys, threading, time
from torchweft import process
supervisor = int(sys.argv[1]) if sys.argv[1] else None
marks = process.Marks(sys.argv[2]) if sys.argv[2] else None
code = process.fork_guarded(supervisor=supervisor, pass_on=sys.argv[3] == "on", marks=marks)
if code is not None:
    os.write(1, f"guard saw {code}\\n".encode())
    if code:
        process.end_like(code)
    time.sleep(0 if sys.argv[4] == "go" else 60)
    sys.exit()
def say(word):
    os.write(1, (word + "\\n").encode())
def on(number, word, *then):
    signal.signal(number, lambda *_: (say(word), *(t() for t in then)))
def rest(seconds):
    # In steps: Python sleeps through a signal that comes just before the system call.
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)
"""


@pytest.fixture
def guard() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a guard and its rank, which runs the code."""
    started: list[subprocess.Popen[str]] = []

    def begin(
        code: str, supervisor: int | None = None, marks: Path | None = None, then: str = "go", **how
    ) -> subprocess.Popen[str]:
        pass_on = "on" if how.get("pass_on", True) else "off"
        given = ["" if supervisor is None else str(supervisor), str(marks or ""), pass_on, then]
        process = subprocess.Popen(
            [sys.executable, "-c", GUARD + code, *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[] if supervisor is None else [supervisor],
            start_new_session=True,
            env={**os.environ, "RANK": "7"},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        # The whole session, so that a rank that a guard forgot is seen by the pipe that it holds.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and output, once nobody holds the output any more."""
    out, _ = process.communicate(timeout=30)
    return process.returncode, out


def until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n"


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("os._exit(0)", 0),
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -11),
        ("os.kill(os.getpid(), signal.SIGRTMIN)", -34),
    ],
)
def test_the_guard_ends_as_the_rank(end: str, code: int, guard, tmp_path: Path) -> None:
    assert ended(guard(end, marks=tmp_path)) == (code, f"guard saw {code}\n")
    assert Marks(str(tmp_path)).read() == {7: code}


def test_a_signal_is_passed_on(guard, tmp_path: Path) -> None:
    code = (
        "on(signal.SIGUSR1, 'usr1')\n"
        "on(signal.SIGTERM, 'term', lambda: sys.exit(5))\n"
        "say('ready')\nrest(60)\n"
    )
    process = guard(code, marks=tmp_path)
    until(process, "ready")
    process.send_signal(signal.SIGUSR1)
    until(process, "usr1")
    process.terminate()
    assert ended(process) == (5, "term\n")
    # It was told to, so that this is nobody's failure.
    assert Marks(str(tmp_path)).read() == {}


def test_a_signal_for_all_comes_once(guard) -> None:
    """torch's agent sends signals to a whole session."""
    code = "on(signal.SIGTERM, 'term')\nsay('ready')\nrest(1)\n"
    process = guard(code, pass_on=False)
    until(process, "ready")
    os.killpg(process.pid, signal.SIGTERM)
    assert ended(process) == (0, "term\n")


def test_an_interrupt_from_a_terminal_comes_once(guard) -> None:
    code = (
        "on(signal.SIGINT, 'interrupted')\non(signal.SIGTERM, 'term')\n"
        "say('ready')\nrest(1)\nsay('saved')\n"
    )
    process = guard(code)
    until(process, "ready")
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process) == (0, "interrupted\nsaved\n")


def test_an_interrupt_for_the_guard_alone_is_not_lost(guard) -> None:
    process = guard("say('ready')\nrest(60)\n")
    until(process, "ready")
    process.send_signal(signal.SIGINT)
    assert ended(process) == (-signal.SIGTERM, "")


def test_a_guard_that_was_told_to_end_waits_for_nobody(guard) -> None:
    """Its caller would wait for ever for something that nobody sends any more."""
    code = "on(signal.SIGTERM, 'term', lambda: os._exit(0))\nsay('ready')\nrest(60)\n"
    process = guard(code, then="wait")
    until(process, "ready")
    process.terminate()
    assert ended(process) == (0, "term\n")


def test_a_guard_whose_rank_is_gone_can_be_ended(guard) -> None:
    process = guard("os._exit(0)", then="wait")
    until(process, "guard saw 0")
    process.terminate()
    assert ended(process)[0] == -signal.SIGTERM


def test_the_rank_ends_with_whoever_waits_for_it(guard) -> None:
    reader, writer = os.pipe()
    process = guard("say('ready')\nrest(60)\n", supervisor=reader)
    until(process, "ready")
    os.close(reader)
    os.close(writer)
    assert ended(process) == (-9, "guard saw -9\n")


def test_the_rank_ends_with_its_guard(guard) -> None:
    process = guard("say('ready')\nrest(60)\n")
    until(process, "ready")
    process.kill()
    assert ended(process) == (-9, "")


@pytest.mark.parametrize("failed", [True, False])
def test_a_rank_that_minds_no_signal(failed: bool, guard, tmp_path: Path) -> None:
    """Seconds where another rank failed; otherwise it has the time that it needs."""
    code = "on(signal.SIGTERM, 'term')\nsay('ready')\nrest(3.5)\nsay('saved')\n"
    process = guard(code, marks=tmp_path)
    until(process, "ready")
    if failed:
        Marks(str(tmp_path)).tell(2, 1)
    process.terminate()
    if failed:
        assert ended(process) == (-9, "term\n")
    else:
        assert ended(process) == (0, "term\nsaved\n")


def test_what_the_guard_holds_in_memory_is_written_once(guard) -> None:
    process = guard("os._exit(0)")
    assert ended(process)[1].count("guard saw") == 1
