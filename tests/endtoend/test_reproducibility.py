"""Two runs with one seed on two ranks end bitwise equal."""

from __future__ import annotations

import sys

from tests.endtoend.commands import SCRIPTS

SCRIPT = SCRIPTS / "reproduce.py"


def test_one_seed_one_run(run) -> None:
    commands = {
        "first": [sys.executable, SCRIPT, "7"],
        "again": [sys.executable, "-m", "torchweft", "run", "--devices", "2", SCRIPT, "7"],
        "other": [sys.executable, SCRIPT, "8"],
    }
    results = {name: run(*command) for name, command in commands.items()}
    assert all(result.status == 0 for result in results.values()), results
    shown = {name: result.out.splitlines() for name, result in results.items()}
    # What was read, what was learned and where the streams stand, on both ranks.
    assert shown["first"] == shown["again"]
    assert len(shown["first"]) == 2
    (_, seen0, weights0, drawn0), (_, seen1, weights1, drawn1) = map(str.split, shown["first"])
    assert seen0 != seen1
    assert drawn0 != drawn1
    # Buffers of rank 0 are everybody's before a forward, not after the last one.
    assert weights0 != weights1
    assert not {seen0, weights0, drawn0} & set(shown["other"][0].split())
