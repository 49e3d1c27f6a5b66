from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.core.fresh_python import python

from torchweft.builtin.launchers import supervisor as module
from torchweft.builtin.launchers.supervisor import Supervisor, ToldToEnd
from torchweft.errors import RankFailed


class Child:
    """A process with the attributes that a rank has."""

    def __init__(self, code: str) -> None:
        self.popen = subprocess.Popen([sys.executable, "-c", HEAD + code])

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def exitcode(self) -> int | None:
        return self.popen.poll()


HEAD = "import os, signal, sys, time\nstubborn = signal.SIG_IGN\n"
FOR_EVER = "time.sleep(600)"

Watch = Callable[..., Supervisor]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    """A supervisor of processes that run the codes given, inside its block."""
    made: list[Supervisor] = []

    def begin(*codes: str, **options: object) -> Supervisor:
        files = {rank: tmp_path / f"{rank}.json" for rank in range(len(codes))}
        supervisor = Supervisor(files, **options)  # type: ignore[arg-type]
        made.append(supervisor)
        supervisor.__enter__()
        for rank, code in enumerate(codes):
            supervisor.children[rank] = Child(code)
        return supervisor

    yield begin
    for supervisor in made:
        supervisor.__exit__(None, None, None)
        assert all(child.exitcode is not None for child in supervisor.children.values())


def tell(path: Path, message: str, *, lost_peer: bool = False) -> str:
    """Code that leaves an error file."""
    extra = {"py_callstack": "Traceback of it", "time_ns": time.time_ns(), "lost_peer": lost_peer}
    content = json.dumps({"message": {"message": message, "extraInfo": extra}})
    return f"open({str(path)!r}, 'w').write({content!r}); "


def test_all_end_well(watch: Watch) -> None:
    calls: list[float] = []

    def idle(seconds: float) -> None:
        calls.append(seconds)
        time.sleep(seconds)

    watch("time.sleep(0.2)", "pass").wait(idle)
    assert set(calls) == {module._TICK}


def test_one_failure_ends_all_of_them(watch: Watch, tmp_path: Path) -> None:
    ready = str(tmp_path / "ready")
    stubborn = f"signal.signal(15, stubborn); os.mkdir({ready!r}); time.sleep(600)"
    wait = f"while not os.path.exists({ready!r}):\n    time.sleep(0.01)\n"
    failing = wait + tell(tmp_path / "1.json", "ValueError: no") + "sys.exit(1)"
    supervisor = watch(FOR_EVER, failing, stubborn)
    with pytest.raises(RankFailed, match=r"rank 1 of 3 failed: ValueError: no\n\nTraceback of it$"):
        supervisor.wait()
    assert [child.exitcode for child in supervisor.children.values()] == [-15, 1, -9]


def test_a_rank_that_was_killed(watch: Watch) -> None:
    with pytest.raises(RankFailed, match=r"rank 0 of 2 failed: killed by signal 9") as caught:
        watch("os.kill(os.getpid(), 9)", FOR_EVER).wait()
    assert caught.value.exit_status == 137


def test_the_cause_may_come_after_its_consequence(watch: Watch, tmp_path: Path) -> None:
    """A rank that lost its peer can be gone before the one that failed has tidied up."""
    lost = tell(tmp_path / "0.json", "Connection closed", lost_peer=True) + "sys.exit(1)"
    cause = "time.sleep(0.4); " + tell(tmp_path / "1.json", "ValueError: no") + FOR_EVER
    with pytest.raises(RankFailed, match=r"^rank 1 of 2 failed: ValueError: no\nafter it: rank 0"):
        watch(lost, cause).wait()


def test_a_rank_that_left_before_is_named(watch: Watch, tmp_path: Path) -> None:
    lost = tell(tmp_path / "0.json", "Connection closed", lost_peer=True) + "sys.exit(1)"
    with pytest.raises(RankFailed, match="rank 0 of 2 lost rank 1, which was done, without"):
        watch(lost, "time.sleep(0.3)").wait()


def test_an_error_on_the_way_out_of_the_block_leaves_nobody(watch: Watch, tmp_path: Path) -> None:
    child: Child | None = None
    with pytest.raises(OSError, match="no more processes"), Supervisor({}) as supervisor:
        supervisor.children[0] = child = Child(FOR_EVER)
        raise OSError("no more processes")
    assert child is not None
    assert child.exitcode == -15


def test_handlers_are_given_back(watch: Watch) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    with Supervisor({}):
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_child_that_was_forked_supervises_nobody(watch: Watch) -> None:
    supervisor = watch(FOR_EVER)
    child = supervisor.children[0]
    handler = signal.getsignal(signal.SIGTERM)
    supervisor.disown()
    assert signal.getsignal(signal.SIGTERM) is not handler
    supervisor.__exit__(None, None, None)
    assert child.exitcode is None
    os.kill(child.pid or 0, signal.SIGKILL)
    while child.exitcode is None:
        time.sleep(0.01)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Supervisor({}):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_exit_statuses_are_ours_where_children_are_ignored() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(RankFailed, match="exit status 3"):
            with Supervisor({0: Path("none")}) as supervisor:
                supervisor.children[0] = Child("sys.exit(3)")
                supervisor.wait()
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_elsewhere_than_in_the_main_thread(watch: Watch) -> None:
    """Where no handler can be set, it watches all the same."""
    found: list[BaseException] = []

    def run() -> None:
        try:
            with Supervisor({0: Path("none"), 1: Path("none")}) as supervisor:
                supervisor.children = {0: Child("sys.exit(3)"), 1: Child(FOR_EVER)}
                supervisor.wait()
        except RankFailed as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [str(error) for error in found] == ["rank 0 of 2 failed: ended with exit status 3"]


def after(seconds: float, *numbers: int, pid: int | None = None) -> threading.Thread:
    def send() -> None:
        for number in numbers:
            time.sleep(seconds)
            os.kill(pid or os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


READY = "print('ready', flush=True)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_told_to_end(number: signal.Signals, watch: Watch) -> None:
    """The signal is passed on; there is time to save, more than after a failure."""
    supervisor = watch(FOR_EVER, FOR_EVER)
    thread = after(0.3, number)
    with pytest.raises(ToldToEnd, match=number.name) as caught:
        supervisor.wait()
    thread.join()
    assert caught.value.number == number
    assert [child.exitcode for child in supervisor.children.values()] == [-number, -number]


def test_a_rank_that_saves_is_given_time(watch: Watch, tmp_path: Path) -> None:
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    code = (
        "def save(*_):\n"
        "    time.sleep(2.5)\n"
        f"    open({str(saved)!r}, 'w')\n"
        "    sys.exit(0)\n"
        "signal.signal(15, save)\n"
        f"open({str(ready)!r}, 'w')\n"
        # Python sleeps through a signal that comes just before the system call.
        "while True: time.sleep(0.1)\n"
    )
    supervisor = watch(code)
    while not ready.exists():
        time.sleep(0.01)
    after(0.1, signal.SIGTERM).join()
    with pytest.raises(ToldToEnd):
        supervisor.wait()
    assert saved.exists()


def test_told_twice(watch: Watch, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    supervisor = watch(f"signal.signal(15, stubborn); open({str(ready)!r}, 'w'); time.sleep(600)")
    while not ready.exists():
        time.sleep(0.01)
    after(0.2, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(ToldToEnd):
        supervisor.wait()
    assert supervisor.children[0].exitcode == -9


def test_an_interrupt_is_not_repeated(watch: Watch) -> None:
    """The terminal sent it to every rank; one that did not get it is told otherwise, later."""
    supervisor = watch("time.sleep(0.6)", FOR_EVER)
    after(0.1, signal.SIGINT).join()
    with pytest.raises(ToldToEnd) as caught:
        supervisor.wait()
    assert caught.value.number == signal.SIGINT
    assert [child.exitcode for child in supervisor.children.values()] == [0, -15]


def test_a_notice_is_the_ranks_and_ends_nothing() -> None:
    code = """
    import os, signal, subprocess, sys, threading, time
    from torchweft import process
    from torchweft.builtin.launchers.supervisor import Supervisor
    class Child:
        def __init__(self):
            self.popen = subprocess.Popen(
                [sys.executable, "-c", "import signal, time, sys\\n"
                 "signal.signal(signal.SIGUSR1, lambda *_: (print('saved'), sys.exit(0)))\\n"
                 "print('ready', flush=True)\\n"
                 "while True: time.sleep(0.1)"], stdout=subprocess.PIPE, text=True)
            self.popen.stdout.readline()
        pid = property(lambda self: self.popen.pid)
        exitcode = property(lambda self: self.popen.poll())
    with Supervisor({}, pass_on=process.NOTICE) as supervisor:
        supervisor.children[0] = child = Child()
        os.kill(os.getpid(), signal.SIGUSR1)
        supervisor.wait()
    print(child.popen.stdout.read())
    """
    done = python(code)
    assert done.stdout == "saved\n\n", done.stderr
