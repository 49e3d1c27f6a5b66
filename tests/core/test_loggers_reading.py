"""Reading logs back: what loggers wrote, and what is left of it after an accident."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft.errors import NotAvailable
from torchweft.loggers import CSVLogger, TensorBoardLogger
from torchweft.loggers.reading import Curve, Logs, read_logs


def points(logs: Logs) -> dict[tuple[str, str, str], list[tuple[int, float]]]:
    return {
        (c.run, c.source, c.metric): list(zip(c.steps, c.values, strict=True)) for c in logs.curves
    }


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_both_kinds_of_files_are_read(tmp_path: Path) -> None:
    for logger in (CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")):
        logger.log_metrics({"loss": 0.5}, 1)
        logger.log_metrics({"loss": 0.25, "acc": 1}, 2)
        logger.finalize("success")
    logs = read_logs(tmp_path)
    assert logs.notes == []
    assert points(logs) == {
        ("csv/version_0", "csv", "loss"): [(1, 0.5), (2, 0.25)],
        ("csv/version_0", "csv", "acc"): [(2, 1.0)],
        ("tb/version_0", "tensorboard", "loss"): [(1, 0.5), (2, 0.25)],
        ("tb/version_0", "tensorboard", "acc"): [(2, 1.0)],
    }


def test_every_event_is_read_and_not_a_sample(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in range(12000):
        logger.experiment.add_scalar("loss", step, step)
    logger.finalize("success")
    (curve,) = read_logs(tmp_path).curves
    assert curve.steps == list(range(12000))


def test_runs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("version_10", "version_9", "best", "version_0"):
        write(tmp_path / name / "metrics.csv", "step,loss\n1,0.5\n")
    runs = [curve.run for curve in read_logs(tmp_path).curves]
    assert runs == ["best", "version_0", "version_9", "version_10"]


def test_the_folder_of_one_run(tmp_path: Path) -> None:
    write(tmp_path / "metrics.csv", "step,loss\n1,0.5\n")
    assert points(read_logs(tmp_path)) == {(".", "csv", "loss"): [(1, 0.5)]}


def test_a_run_that_went_back_to_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "metrics.csv", "step,loss,acc\n1,1,\n2,2,5\n3,3,\n2,20,\n3,30,\n3,31,\n")
    assert points(read_logs(tmp_path)) == {
        (".", "csv", "loss"): [(1, 1.0), (2, 20.0), (3, 31.0)],
        (".", "csv", "acc"): [(2, 5.0)],
    }


@given(st.lists(st.integers(0, 9)))
def test_steps_of_a_curve_grow(steps: list[int]) -> None:
    curve = Curve(run="", source="csv", metric="loss")
    for place, step in enumerate(steps):
        curve.add(step, place)
    assert all(one < two for one, two in zip(curve.steps, curve.steps[1:], strict=False))
    assert curve.steps[-1:] == steps[-1:]
    assert all(
        steps[int(place)] == step for step, place in zip(curve.steps, curve.values, strict=True)
    )


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    write(tmp_path / "metrics.csv", "step,loss,bad\n1,nan,nan\n2,3,inf\n3,-inf,\n4,2,\n5,inf,\n")
    loss, bad = read_logs(tmp_path).curves
    assert [loss.lowest(), loss.highest(), loss.nonfinite] == [3, 1, 3]
    assert [bad.lowest(), bad.highest(), bad.nonfinite] == [None, None, 2]
    assert math.isnan(loss.values[0])


@pytest.mark.parametrize(
    ("text", "found", "note"),
    [
        ("", [], None),
        ("step,loss\n", [], None),
        ("step,lo", [], "ends within a line, which was left out"),
        ("step,loss\n1,0.5\n2,0.", [(1, 0.5)], "ends within a line, which was left out"),
        ("step,loss\n1,0.5\n2\n\n", [(1, 0.5)], None),
        ("step,loss\n1,0.5\n2,0.5,3\n", [(1, 0.5), (2, 0.5)], None),
        ("step,loss\n1,0.5\n2,much\n", [(1, 0.5)], "column 'loss': cells that are no numbers"),
        ("step,loss\n1,0.5\nx,1\n", [(1, 0.5)], "column 'step': cells that are no numbers"),
        ("step,loss\n1,0.5\ninf,1\n", [(1, 0.5)], "column 'step': cells that are no numbers"),
        ("step,loss\n1.0,0.5\n", [(1, 0.5)], None),
        ("step,loss\r\n1,0.5\r\n", [(1, 0.5)], None),
        ("name,price\na,1\n", [], "has no column 'step', so that it is no table of a logger"),
        (b"\xff\xfe\x00", [], "cannot be read: 'utf-8' codec can't decode"),
    ],
)
def test_tables_that_are_not_whole(
    tmp_path: Path, text: str | bytes, found: list[tuple[int, float]], note: str | None
) -> None:
    path = write(tmp_path / "metrics.csv", text)
    logs = read_logs(tmp_path)
    assert list(points(logs).values()) == ([found] if found else [])
    if note is None:
        assert logs.notes == []
    else:
        (said,) = logs.notes
        assert said.startswith(str(path))
        assert note in said


@given(st.text(alphabet="step,los0123.e-nai\n\"' ", max_size=60))
def test_no_table_makes_it_fail(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "metrics.csv"), f"step,loss\n{text}")
        for curve in read_logs(Path(folder)).curves:
            assert curve.values


@pytest.fixture
def events(tmp_path: Path) -> Path:
    logger = TensorBoardLogger(tmp_path, version=0)
    for step in range(5):
        logger.log_metrics({"loss": step}, step)
    logger.finalize("success")
    (path,) = Path(logger.log_dir).iterdir()
    return path


@pytest.mark.parametrize(("cut", "left"), [(1, 4), (30, 4), (60, 3)])
def test_event_files_that_end_within_an_event(
    tmp_path: Path, events: Path, cut: int, left: int
) -> None:
    write(events, events.read_bytes()[:-cut])
    logs = read_logs(tmp_path)
    (curve,) = logs.curves
    assert curve.values == list(range(left))
    assert logs.notes == [
        f"{events} ends within an event, or is damaged; what is behind that place was left out"
    ]


@pytest.mark.parametrize(("content", "notes"), [(b"", 0), (b"hello", 1), (b"x" * 100, 1)])
def test_files_that_are_no_event_files(tmp_path: Path, content: bytes, notes: int) -> None:
    write(tmp_path / "events.out.tfevents.1.host.1", content)
    logs = read_logs(tmp_path)
    assert logs.curves == []
    assert len(logs.notes) == notes


def test_an_empty_folder(tmp_path: Path) -> None:
    assert read_logs(tmp_path) == Logs(curves=[], notes=[])


@pytest.mark.usefixtures("events")
def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(
        NotAvailable,
        match=r"version_0 holds event files of TensorBoard, and the package tensorboard, which "
        r'reads them, is not installed; try: pip install "torchweft\[logs\]"$',
    ):
        read_logs(tmp_path)
