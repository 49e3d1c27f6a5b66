"""Two ranks, two loggers, one set of files, however the ranks were made."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.endtoend.commands import SCRIPTS, ways

SCRIPT = SCRIPTS / "log.py"
PYTHON = [sys.executable, str(SCRIPT)]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tb" / "version_0"))
    events.Reload()
    return {
        metric: [(event.step, event.value) for event in events.Scalars(metric)]
        for metric in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("way", ["python", "torchweft run", "torchrun", "fork", "spawn"])
def test_rank_0_alone_writes(run, tmp_path: Path, way: str) -> None:
    if way in ("fork", "spawn"):
        result = run(*PYTHON, tmp_path, way)
    else:
        result = run(*ways(SCRIPT)[way], tmp_path)
    assert result.status == 0, result.err
    versions = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")}
    assert versions == {"csv/version_0", "tb/version_0"}
    assert result.out.split() == [str(tmp_path / version) for version in sorted(versions)]

    table = rows(tmp_path)
    assert [row["step"] for row in table] == ["0", "1", "2", "3", "3", "4", "5"]
    assert {row["rank"] for row in table} == {"0", ""}
    assert [row["late"] for row in table if row["late"]] == ["3"]
    assert table[-1]["direct"] == "0"
    hyperparams = json.loads((tmp_path / "csv" / "version_0" / "hparams.json").read_text())
    assert hyperparams == {"lr": 0.1, "world_size": 2}

    shown = scalars(tmp_path)
    assert [step for step, _ in shown["loss"]] == [0, 1, 2, 3, 4]
    assert shown["rank"] == [(step, 0.0) for step in range(5)]
    assert shown["late"] == [(3, 3.0)]
    assert shown["direct"] == [(5, 0.0)]
    losses = [float(row["loss"]) for row in table if row["loss"]]
    assert [value for _, value in shown["loss"]] == pytest.approx(losses)


def test_what_was_logged_before_a_failure_is_there(run, tmp_path: Path) -> None:
    result = run(*PYTHON, tmp_path, "fail")
    assert result.status == 1
    assert "rank 0 of 2 failed: ValueError: rank zero has had enough" in result.err
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3", "3"]
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [0, 1, 2, 3]
