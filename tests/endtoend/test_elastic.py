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

from tests.endtoend.commands import SCRIPTS, Command
from tests.endtoend.networks import Host, hosts, why_no_hosts
from torchweft.process import read_stacks

ROUNDS = SCRIPTS / "rounds.py"
EXAMPLE = Path(__file__).parents[2] / "examples/elastic/train.py"
Begin = Callable[..., Command]

MISSED = (
    "1 of 2 nodes has not been heard of for some time (--rdzv-conf keep_alive_interval, "
    "keep_alive_max_attempt)"
)
#: How quickly a host that is gone is missed, and how long others may come.
QUICK = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"


@pytest.fixture(scope="module")
def three() -> Iterator[list[Host]]:
    reason = why_no_hosts()
    if reason:
        pytest.skip(reason)
    with hosts(3) as made:
        yield made


@pytest.fixture
def pair(three: list[Host]) -> list[Host]:
    return three[:2]


@pytest.fixture
def begin(
    three: list[Host], start: Callable[..., Command], tmp_path: Path
) -> Callable[..., Command]:
    """Start a command on a host: the example's, unless another script is named."""

    def on(
        number: int, nodes: str, *more: str, steps: int = 200, script: Path = EXAMPLE
    ) -> Command:
        temporary = tmp_path / f"t{number}"
        temporary.mkdir(exist_ok=True)
        options = ["--folder", tmp_path / "saved", "--steps", str(steps), "--pause", "0.03"]
        return start(
            *three[number].command(sys.executable, "-m", "torchweft", "run", "--devices", "1"),
            *("--num-nodes", nodes, "--rdzv-backend", "c10d", "--rdzv-conf", QUICK),
            *("--rdzv-endpoint", f"{three[0].address}:29500", *more, script),
            *(options if script == EXAMPLE else [tmp_path / "stop"]),
            environ={"TMPDIR": str(temporary), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )

    return on


#: Time for three of them, of which each looks once in a second.
FOR_THREE = ["--rdzv-conf", QUICK.replace("last_call_timeout=1", "last_call_timeout=4")]


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
    # The second host's failure is the second host's.
    assert [restart for _, _, restart in attempts] == [0, 0, 1]
    lost, again = done.err.split("\n")[0], done.err.split("\n")[-3:-1]
    assert lost.startswith("torchweft: rank 0 of 2 lost another: RuntimeError: "), done.err
    assert done.err.count("torchweft: ") == 2
    assert again[-1] == "torchweft: beginning anew, attempt 2 of 4 (--max-restarts)"
    assert "\nno other node told why; see whether one, or its command, was ended\n" in done.err
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


def test_a_third_host_costs_no_restart(begin, tmp_path: Path) -> None:
    """Whoever learns of it first, and however the ranks of the others end then."""
    first = begin(0, "1:3", *FOR_THREE, script=ROUNDS)
    until(lambda: rank_of(tmp_path / "t0", 0) is not None, first)
    others = [begin(1, "1:3", *FOR_THREE, script=ROUNDS)]
    until(lambda: rank_of(tmp_path / "t1", 0) is not None, first, *others)
    time.sleep(1)  # in which both have looked at what they know of the rendezvous
    others.append(begin(2, "1:3", *FOR_THREE, script=ROUNDS))
    until(lambda: rank_of(tmp_path / "t2", 0) is not None, first, *others)
    (tmp_path / "stop").touch()
    done = [command.finish() for command in (first, *others)]
    assert [(each.status, each.err) for each in done] == [(0, "")] * 3
    began = [begins(each.out) for each in done]
    assert began == [[(0, size, 0) for size in sizes] for sizes in ([1, 2, 3], [2, 3], [3])]
    assert [each.out.splitlines()[-1] for each in done] == ["ends with 3 processes"] * 3


def test_a_third_host_and_a_script_that_leaves_when_it_is_told(begin, tmp_path: Path) -> None:
    first = begin(0, "1:3", *FOR_THREE, steps=1000)
    until((tmp_path / "saved" / "newest.ckpt").exists, first)
    second = begin(1, "1:3", *FOR_THREE, steps=1000)
    until(lambda: rank_of(tmp_path / "t1", 0) is not None, first, second)
    time.sleep(1)
    third = begin(2, "1:3", *FOR_THREE, steps=1000)
    until(lambda: rank_of(tmp_path / "t2", 0) is not None, first, second, third)
    changed = (tmp_path / "saved" / "newest.ckpt").stat().st_mtime_ns
    until(
        lambda: (tmp_path / "saved" / "newest.ckpt").stat().st_mtime_ns != changed,
        *(first, second, third),
    )
    third.popen.send_signal(signal.SIGTERM)
    ends = [command.finish() for command in (third, first, second)]
    assert [end.status for end in ends] == [143, 0, 0], [end.err for end in ends]
    sizes = [[size for _, size, _ in begins(end.out)] for end in ends]
    assert sizes == [[3], [1, 2, 3], [2, 3]]
    assert {restart for end in ends for _, _, restart in begins(end.out)} == {0}
    last = [end.out.splitlines()[-1] for end in ends]
    assert len({*last}) == 1
    assert re.fullmatch(r"ends at step \d+ with 3 processes", last[0])


@pytest.mark.parametrize("restarts", ["1", "0"])
def test_a_host_that_is_gone_without_a_word(restarts: str, begin, pair, tmp_path: Path) -> None:
    """No connection is closed by it, so that ranks would wait for it for half an hour."""
    first = begin(0, "1:2", "--max-restarts", restarts, script=ROUNDS)
    until(lambda: rank_of(tmp_path / "t0", 0) is not None, first)
    second = begin(1, "1:2", script=ROUNDS)
    until(lambda: rank_of(tmp_path / "t1", 0) is not None, first, second)
    with pair[1].unplugged():
        if restarts == "0":
            done = first.finish()
            assert done.status == 1
            assert done.err == (
                f"error: {MISSED}; see whether its computer, the network or its command was ended, "
                "or let the others begin anew with --max-restarts\n"
            )
        else:
            until(lambda: rank_of(tmp_path / "t0", 1) is not None, first)
            (tmp_path / "stop").touch()
            done = first.finish()
            assert done.status == 0, done.err
            assert begins(done.out)[-1] == (0, 1, 1)
            assert done.err == (
                f"torchweft: {MISSED}\ntorchweft: beginning anew, attempt 2 of 2 (--max-restarts)\n"
            )
        second.popen.kill()
        second.finish()


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
