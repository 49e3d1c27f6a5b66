from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from torchweft.errors import RankFailed
from torchweft.failures import Failure, first_failure, read_failure, report, signal_name


def raised(rank: int, message: str, at: int, *, lost_peer: bool = False) -> Failure:
    trace = f"Traceback of rank {rank}\n"
    return Failure(
        rank=rank, exitcode=1, message=message, trace=trace, time_ns=at, lost_peer=lost_peer
    )


LOST = "RuntimeError: Connection closed by peer"


@pytest.mark.parametrize(
    ("failure", "cause", "status"),
    [
        (raised(0, "ValueError: no", 1), "ValueError: no", 1),
        (Failure(rank=0, exitcode=3), "ended with exit status 3", 3),
        (Failure(rank=0, exitcode=-9), "killed by signal 9 (SIGKILL)", 137),
        (Failure(rank=0, exitcode=-11), "killed by signal 11 (SIGSEGV)", 139),
        (Failure(rank=0, exitcode=-33), "killed by signal 33 (unknown)", 161),
    ],
)
def test_what_ended_a_rank(failure: Failure, cause: str, status: int) -> None:
    assert failure.cause() == cause
    assert failure.exit_status == status


def test_names_of_signals() -> None:
    assert signal_name(15) == "SIGTERM"
    assert signal_name(999) == "unknown"


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        # The earliest.
        ([raised(0, "A", 2), raised(1, "B", 1)], 1),
        # Not one that only lost its peer, however early it is.
        ([raised(0, LOST, 1, lost_peer=True), raised(1, "B", 2)], 1),
        # One that was killed could tell no time.
        ([raised(0, LOST, 1, lost_peer=True), Failure(rank=1, exitcode=-9)], 1),
        # One that was asked to end did nothing wrong.
        ([Failure(rank=0, exitcode=-15), raised(1, LOST, 2, lost_peer=True)], 0),
        ([Failure(rank=0, exitcode=-15), raised(1, "B", 2)], 1),
        ([raised(1, "A", 1), raised(0, "A", 1)], 0),
    ],
)
def test_the_cause_among_several(failures: list[Failure], rank: int) -> None:
    assert first_failure(failures).rank == rank


def test_one_report() -> None:
    failures = [
        raised(2, LOST + " [127.0.0.1]\nmore", 3, lost_peer=True),
        raised(1, "ValueError: no", 1),
        raised(3, "ValueError: no", 2),
        Failure(rank=0, exitcode=-9),
    ]
    told = report(failures[:3], 4)
    assert str(told) == (
        "rank 1 of 4 failed: ValueError: no\n"
        "and so did rank 3\n"
        "after it: rank 2 lost another: RuntimeError: Connection closed by peer [127.0.0.1]\n"
        "\n"
        "Traceback of rank 1"
    )
    assert (told.rank, told.exit_status) == (1, 1)
    assert report(failures, 4).exit_status == 137


def test_of_those_that_failed_alike_the_lowest_rank_is_named() -> None:
    told = report([raised(rank, "ValueError: no", 9 - rank) for rank in (0, 1, 2)], 3)
    assert str(told).startswith("rank 0 of 3 failed: ValueError: no\nand so did rank 1, 2\n")
    assert told.rank == 0


def test_where_it_failed_and_what_the_others_were_doing() -> None:
    failed = replace(raised(1, "ValueError: no", 1), node="n7", pid=12)
    lost = [
        raised(rank, f"RuntimeError: [/a/pair.cc:5{rank}] Connection closed", 2, lost_peer=True)
        for rank in (0, 4)
    ]
    doing = {2: "train.py:14 in step", 3: "train.py:14 in step", 5: "x.py:9 in a", 0: "x"}
    told = report([failed, *lost, Failure(rank=6, exitcode=-15, doing="a.py:1 in b")], 7, (), doing)
    assert str(told).splitlines()[:4] == [
        "rank 1 of 7 failed: ValueError: no",
        "on n7, process 12, with exit status 1",
        "after it: rank 0, 4 lost another: RuntimeError: Connection closed",
        "meanwhile: rank 2, 3 at train.py:14 in step; rank 5 at x.py:9 in a; rank 6 at a.py:1 in b",
    ]
    killed = Failure(rank=0, exitcode=-9, node="n7", pid=12)
    assert str(report([killed], 2)) == (
        "rank 0 of 2 failed: killed by signal 9 (SIGKILL)\non n7, process 12"
    )


def test_the_kernel_ended_it_for_want_of_memory() -> None:
    killed = Failure(rank=0, exitcode=-9)
    assert "\nmemory ran out: the kernel has ended a process" in str(
        report([killed], 2, oom_kills=1)
    )
    assert "memory" not in str(report([killed], 2))
    assert "memory" not in str(report([Failure(rank=0, exitcode=-15)], 2, oom_kills=1))


def test_of_many_ranks_a_few_are_named() -> None:
    told = str(report([raised(0, "A", 1)], 99, (), dict.fromkeys(range(1, 99), "a.py:1 in b")))
    assert "15, 16 and 82 more at a.py:1 in b" in told


def test_the_node_is_named_where_there_are_several() -> None:
    failures = [Failure(rank=rank, exitcode=-9, node=f"host-{rank}") for rank in (2, 1)]
    assert str(report(failures, 4)) == (
        "rank 1 of 4 failed: killed by signal 9 (SIGKILL)\non host-1\nand so did rank 2"
    )


def test_long_words_of_others_are_shortened() -> None:
    told = str(report([raised(0, "A", 1), raised(1, "B" * 500, 2)], 2))
    assert f"after it: rank 1: {'B' * 97}...\n" in told


def test_ranks_that_were_done_explain_a_lost_peer() -> None:
    lost = raised(0, LOST, 1, lost_peer=True)
    told = str(report([lost], 3, done=[2, 1]))
    assert told.startswith(
        "rank 0 of 3 lost rank 1, 2, which was done, without an error; every rank has to take part "
        "in every collective operation\n"
    )
    failed = report([raised(0, "ValueError: no", 1)], 3, done=[1])
    assert str(failed).startswith("rank 0 of 3 failed: ValueError: no\n")
    assert str(report([lost], 3)).startswith(f"rank 0 of 3 lost another: {LOST}\n")


def test_a_report_is_an_error_that_can_be_sent() -> None:
    told = pickle.loads(pickle.dumps(report([Failure(rank=5, exitcode=-9)], 8)))
    assert isinstance(told, RankFailed)
    assert (str(told), told.rank, told.exit_status) == (
        "rank 5 of 8 failed: killed by signal 9 (SIGKILL)",
        5,
        137,
    )


def test_an_error_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    extra = {"py_callstack": "trace", "time_ns": 7, "rank": 1, "lost_peer": True}
    path.write_text(json.dumps({"message": {"message": "E: no", "extraInfo": extra}}))
    assert read_failure(1, 1, path) == Failure(
        rank=1, exitcode=1, message="E: no", trace="trace", time_ns=7, lost_peer=True
    )


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", '"text"', "{}", '{"message": "of another program"}', "\udcff"]
)
def test_an_error_file_that_tells_nothing(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    assert read_failure(2, -9, path) == Failure(rank=2, exitcode=-9)
