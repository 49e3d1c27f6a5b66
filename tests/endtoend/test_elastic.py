"""A run on several hosts goes on when a rank or a whole host is lost, and when one comes."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.endtoend.commands import Command
from tests.endtoend.networks import Host, hosts, why_no_hosts
from torchweft.process import read_stacks

EXAMPLE = Path(__file__).parents[2] / "examples/elastic/train.py"
Begin = Callable[..., Command]

#: How quickly a host that is gone is missed, and how long others may come.
QUICK = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Host]]:
    reason = why_no_hosts()
    if reason:
        pytest.skip(reason)
    with hosts(2) as made:
        yield made


@pytest.fixture
def begin(
    pair: list[Host], start: Callable[..., Command], tmp_path: Path
) -> Callable[..., Command]:
    """Start the example's command on a host."""

    def on(number: int, nodes: str, *more: str, steps: int = 200) -> Command:
        temporary = tmp_path / f"t{number}"
        temporary.mkdir(exist_ok=True)
        return start(
            *pair[number].command(sys.executable, "-m", "torchweft", "run", "--devices", "1"),
            *("--num-nodes", nodes, "--rdzv-backend", "c10d", "--rdzv-conf", QUICK),
            *("--rdzv-endpoint", f"{pair[0].address}:29500", *more, EXAMPLE),
            *("--folder", tmp_path / "saved", "--steps", str(steps), "--pause", "0.03"),
            environ={"TMPDIR": str(temporary), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )

    return on


def until(reached: Callable[[], bool], *commands: Command) -> None:
    deadline = time.monotonic() + 90
    while not reached():
        assert time.monotonic() < deadline
        for command in commands:
            assert command.popen.poll() is None, command.finish().err
        time.sleep(0.05)


def begins(text: str) -> list[tuple[int, int, int]]:
    """Step, processes and restart with which each attempt began."""
    found = re.findall(r"begins at step (\d+) with (\d+) processes, restart (\d+)", text)
    return [(int(step), int(size), int(restart)) for step, size, restart in found]


def rank_of(folder: Path, attempt: int) -> int | None:
    """The process id of the one rank on a host."""
    for file in folder.glob(f"torchweft-*/*/attempt_{attempt}/0/error.json.stacks"):
        stacks = read_stacks(file.with_name("error.json"))
        if stacks is not None:
            return stacks.pid
    return None


def test_a_killed_rank_and_then_a_killed_host(begin, tmp_path: Path) -> None:
    first = begin(0, "1:2", "--max-restarts", "3")
    second = begin(1, "1:2", "--max-restarts", "3")
    saved = tmp_path / "saved" / "newest.ckpt"
    until(saved.exists, first, second)
    victim = rank_of(tmp_path / "t1", 0)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    until(lambda: rank_of(tmp_path / "t1", 1) is not None, first, second)
    changed = saved.stat().st_mtime_ns
    until(lambda: saved.stat().st_mtime_ns != changed, first, second)
    second.popen.send_signal(signal.SIGKILL)
    done = first.finish()
    assert done.status == 0, done.err
    attempts = begins(done.out)
    assert [size for _, size, _ in attempts] == [2, 2, 1]
    assert [restart for _, _, restart in attempts] == [0, 1, 2]
    steps = [step for step, _, _ in attempts]
    assert steps[0] == 0 < steps[1] < steps[2] < 200
    assert done.out.splitlines()[-1] == "ends at step 200 with 1 processes"


def test_a_host_that_comes_later_takes_part(begin, tmp_path: Path) -> None:
    first = begin(0, "1:2", steps=1000)
    saved = tmp_path / "saved" / "newest.ckpt"
    until(saved.exists, first)
    second = begin(1, "1:2", steps=1000)
    until(lambda: rank_of(tmp_path / "t1", 0) is not None, first, second)
    changed = saved.stat().st_mtime_ns
    until(lambda: saved.stat().st_mtime_ns != changed, first, second)
    # Told on one host alone, all leave at the same step.
    second.popen.send_signal(signal.SIGTERM)
    late, done = second.finish(), first.finish()
    assert (late.status, done.status) == (143, 0), done.err + late.err
    assert [size for _, size, _ in begins(done.out)] == [1, 2]
    ends = [text.splitlines()[-1] for text in (late.out, done.out)]
    assert re.fullmatch(r"ends at step \d+ with 2 processes", ends[0])
    assert ends[0] == ends[1] != "ends at step 1000 with 2 processes"


def test_hosts_that_do_not_come(pair, begin, start, tmp_path: Path) -> None:
    alone = begin(0, "2", "--join-timeout", "2")
    fixed = [
        *(sys.executable, "-m", "torchweft", "run", "--devices", "1", "--num-nodes", "3"),
        *("--main-address", pair[0].address, "--main-port", "29600", "--join-timeout", "4"),
    ]
    waiting = [
        start(
            *host.command(*fixed, "--node-rank", str(rank), str(EXAMPLE)),
            environ={"TORCH_CPP_LOG_LEVEL": "ERROR"},
        )
        for rank, host in enumerate(pair)
    ]
    done = alone.finish()
    assert done.status == 1
    assert (
        f"fewer than 2 nodes had met at --rdzv-endpoint {pair[0].address}:29500 after 2 s "
        "(--join-timeout); start the same command on the others, or lower --num-nodes"
    ) in done.err
    for command in waiting:
        done = command.finish()
        assert done.status == 1
        assert done.err == (
            "error: 1 of 3 nodes did not come within 4 s (--join-timeout): --node-rank 2; start "
            f"the command there too, with --main-address {pair[0].address} and --main-port 29600\n"
        )
