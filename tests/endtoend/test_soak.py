"""Again and again. Short here; ``TORCHWEFT_SOAK=1`` runs them at full length."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.endtoend.commands import SCRIPTS, Command, ways

FULL = os.environ.get("TORCHWEFT_SOAK") == "1"
LAUNCHES = 100 if FULL else 4
RESTARTS = 20 if FULL else 4
#: In half of them a rank is killed.
KILLED = 500 if FULL else 6

STEPS = """
import os, torch
from torchweft import Fabric

fabric = Fabric(accelerator="cpu", devices=os.environ.get("DEVICES", "auto"), strategy="ddp")
fabric.launch()
net = torch.nn.Linear(2, 2)
model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
for step in range(20):
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    optimizer.zero_grad()
total = fabric.all_reduce(fabric.global_rank, reduce_op="sum")
fabric.print(int(total))
"""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_launches_of_four_ranks(way: str, run, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch\n"
        "from torchweft import Fabric\n"
        "devices = os.environ.get('DEVICES', 'auto')\n"
        "fabric = Fabric(accelerator='cpu', devices=devices, strategy='ddp')\n"
        "fabric.launch()\n"
        "model = fabric.setup(torch.nn.Linear(2, 2))\n"
        "fabric.backward(model(torch.ones(1, 2)).sum())\n"
        "total = fabric.all_reduce(fabric.global_rank, reduce_op='sum')\n"
        "fabric.print(int(total))\n"
    )
    environ = {"DEVICES": "4"} if way == "python" else {}
    for launch in range(LAUNCHES):
        result = run(*ways(script, ranks=4)[way], environ=environ, timeout=60)
        assert (result.status, result.out, result.err) == (0, "6\n", ""), f"launch {launch}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [[], ["--no-preload"]], ids=["preload", "fresh"])
def test_restarts_after_a_killed_rank(kind: list[str], run) -> None:
    command = [sys.executable, "-m", "torchweft", "run", *kind, "--devices", "2"]
    result = run(
        *command,
        "--max-restarts",
        str(RESTARTS),
        SCRIPTS / "restarts.py",
        str(RESTARTS),
        timeout=600,
    )
    assert result.status == 0, result.err
    assert sorted(result.lines) == [f"attempt {RESTARTS} rank {r} of 2" for r in (0, 1)]
    told = [line for line in result.err.splitlines() if line.startswith("torchweft: ")]
    assert told == [
        line
        for attempt in range(2, RESTARTS + 2)
        for line in (
            "torchweft: rank 1 of 2 failed: killed by signal 9 (SIGKILL)",
            f"torchweft: beginning anew, attempt {attempt} of {RESTARTS + 1} (--max-restarts)",
        )
    ]


def test_restarts_that_run_out(run) -> None:
    command = [sys.executable, "-m", "torchweft", "run", "--devices", "2"]
    result = run(*command, "--max-restarts", "1", SCRIPTS / "restarts.py", "9")
    assert result.status == 137
    # Of each attempt once.
    assert result.err.count("torchweft: rank 1 of 2 failed: killed by signal 9 (SIGKILL)") == 2


def ranks_of(command: Command) -> list[psutil.Process]:
    """Those of its processes that have made no other: ranks, where there are any yet."""
    there = command.processes()
    parents = {process.ppid() for process in there}
    return [
        process
        for process in there
        if process.pid not in parents
        and process.pid != command.popen.pid
        # The fork server before its first child, and its companion.
        and "resource_tracker" not in " ".join(process.cmdline())
        and not (process.ppid() == command.popen.pid and "forkserver" in str(process.cmdline()))
    ]


def kill_one(command: Command, chance: random.Random, after: float) -> float | None:
    """Kill a rank some time after the first is there; returns when, or None where it had ended."""
    until = None
    while command.popen.poll() is None:
        try:
            ranks = ranks_of(command)
        except psutil.NoSuchProcess:
            continue
        if ranks and until is None:
            until = time.monotonic() + after
        if ranks and until is not None and time.monotonic() >= until:
            victim = chance.choice(ranks)
            try:
                # Stopped, it cannot end by itself any more.
                victim.send_signal(signal.SIGSTOP)
                while victim.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    time.sleep(0.001)
                if victim.status() == psutil.STATUS_STOPPED:
                    victim.kill()
                    return time.monotonic()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.005)
    return None


@pytest.mark.timeout(7200)
def test_a_random_rank_is_killed_at_a_random_moment(start, tmp_path: Path) -> None:
    """However and whenever: an end soon, the right status, one report, and nothing is left."""
    script = tmp_path / "script.py"
    script.write_text(STEPS)
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    # A short name: a socket's path has to fit.
    temporary = Path(tempfile.mkdtemp(prefix="tw-"))
    shared = set(os.listdir("/dev/shm"))
    hit, longest, usual = 0, 0.0, 2.0
    for launch in range(KILLED):
        way = ("python", "torchweft run", "no preload")[launch // 2 % 3]
        environ = {"DEVICES": "4"} if way == "python" else {}
        environ["TMPDIR"] = str(temporary)
        command = start(*ways(script, ranks=4)[way], environ=environ)
        killed = None
        if launch % 2:
            killed = kill_one(command, chance, chance.uniform(0, usual / 2))
        began = time.monotonic()
        done = command.finish(timeout=60)
        where = f"launch {launch} of seed {seed}, {way}: {done}"
        if killed is None:
            assert (done.status, done.out, done.err) == (0, "6\n", ""), where
            if not launch % 2:
                usual = time.monotonic() - began
        else:
            hit += 1
            took = time.monotonic() - killed
            longest = max(longest, took)
            assert took < 15, where
            assert done.status == 137, where
            assert done.err.count("killed by signal 9 (SIGKILL)") == 1, where
            assert done.err.count("failed: ") == 1, where
        assert command.left() == [], where
        left = [name for name in os.listdir(temporary) if not name.startswith("torchinductor")]
        assert left == [], where
        for stream in (command.popen.stdout, command.popen.stderr):
            stream.close()
    print(f"{KILLED} launches, a rank killed in {hit}, at most {longest:.1f} s to the end")
    assert hit >= KILLED // 5
    # Other programs of this computer use it too, for moments.
    deadline = time.monotonic() + 60
    while not set(os.listdir("/dev/shm")) <= shared and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(os.listdir("/dev/shm")) <= shared
    shutil.rmtree(temporary, ignore_errors=True)
