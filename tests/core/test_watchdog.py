from __future__ import annotations

from typing import Any

from torchweft.watchdog import _Progress, explain

OPERATION = {"group": "0", "number": 9, "name": "all_reduce", "what": "all_reduce of 5 Float"}
BEFORE = {**OPERATION, "number": 8}
OTHER = {**OPERATION, "name": "broadcast", "what": "broadcast of 1 Long"}


def state(last: dict[str, Any] | None, at: str = "train.py:4 in step") -> dict[str, Any]:
    return {"last": {"0": last} if last else {}, "at": at}


def test_who_came_and_who_did_not() -> None:
    states = {2: state(OPERATION), 0: state(OPERATION), 1: state(BEFORE), 3: state(None)}
    assert explain(OPERATION, range(5), states) == (
        "rank 0, 2 came to it; rank 1 did not: it is at train.py:4 in step, after all_reduce 8; "
        "rank 3 did not: it is at train.py:4 in step, in none of its group; "
        "rank 4 has ended or does not answer"
    )


def test_of_many_a_few_are_shown() -> None:
    states = {rank: state(BEFORE) for rank in range(1, 40)} | {0: state(OPERATION)}
    told = explain(OPERATION, range(40), states)
    assert told.count("did not: it is at") == 8
    assert "; nor did rank 9, 10, " in told
    assert told.endswith("24 and 15 more")


def test_who_came_with_another_one() -> None:
    states = {0: state(OPERATION), 1: state(OTHER), 2: state({**OTHER, "number": 10})}
    assert explain(OPERATION, range(3), states) == (
        "rank 0, 1, 2 came to it; but rank 1 with another one: broadcast of 1 Long (rank 1)"
    )


def test_ranks_of_other_groups_do_not_count() -> None:
    told = explain(OPERATION, [0, 1], {0: state(OPERATION), 1: state(BEFORE), 2: state(None)})
    assert "rank 2" not in told


def test_how_long_a_group_rests(monkeypatch: Any) -> None:
    now = [100.0]
    monkeypatch.setattr("torchweft.watchdog.time.monotonic", lambda: now[0])
    progress = _Progress()

    def rests(enqueued: int, completed: int) -> float:
        status = {"last_enqueued_collective": enqueued, "last_completed_collective": completed}
        return progress.rests([{"0": status}, None])

    assert rests(5, 4) == 0
    now[0] += 3
    assert rests(5, 4) == 3
    assert rests(6, 5) == 0  # it has come on
    now[0] += 3
    assert rests(6, 6) == 0  # it waits for nothing
    assert rests(7, 6) == 0  # and begins to wait only now
    now[0] += 2
    assert rests(7, 6) == 2
