"""The table of metrics: whole at any time, in one piece, without double rows."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchweft import Fabric
from torchweft.errors import InvalidRequest
from torchweft.loggers import CSVLogger


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(folder: Path) -> Path:
    return folder / "torchweft_logs" / "version_0" / "metrics.csv"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_row_for_each_call(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fabric = Fabric(accelerator="cpu", loggers=logger)
    fabric.log_dict({"loss": torch.tensor(0.5), "acc": 1}, step=1)
    fabric.log("loss", 0.25, step=2)
    assert not list(tmp_path.rglob("*.csv"))
    logger.save()
    assert table(tmp_path).read_text() == "step,loss,acc\n1,0.5,1\n2,0.25,\n"


def test_a_metric_that_appears_later_is_a_new_column(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    logger.log_metrics({"loss": 0.1 + 0.2}, step=1)
    logger.log_metrics({'a, "b"c': 2}, step=2)
    logger.log_metrics({"loss": math.nan, "d": -math.inf}, step=3)
    assert read(table(tmp_path)) == [
        {"step": "1", "loss": "0.30000000000000004", 'a, "b"c': "", "d": ""},
        {"step": "2", "loss": "", 'a, "b"c': "2", "d": ""},
        {"step": "3", "loss": "nan", 'a, "b"c': "", "d": "-inf"},
    ]
    assert files(tmp_path) == {"torchweft_logs/version_0/metrics.csv"}


@given(st.data())
def test_what_is_logged_is_what_is_read(data: st.DataObject) -> None:
    names = st.text(min_size=1, max_size=4).filter(str.isprintable)
    metrics = st.dictionaries(
        names.filter(lambda name: name != "step"),
        st.floats() | st.integers(),
        min_size=1,
        max_size=3,
    )
    rows = data.draw(st.lists(metrics, min_size=1, max_size=6))
    every = data.draw(st.integers(1, 4))
    again = data.draw(st.integers(0, len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.csv")
        for part in (rows[:again], rows[again:]):
            logger = CSVLogger(folder, "", "", flush_logs_every_n_steps=every)
            for row in part:
                logger.log_metrics(row, step=1)
            logger.save()
        got = read(path)
    assert len(got) == len(rows)
    for cells, row in zip(got, rows, strict=True):
        found = {name: float(cell) for name, cell in cells.items() if cell and name != "step"}
        expected = {name: float(value) for name, value in row.items()}
        assert repr(found) == repr({name: expected[name] for name in found})
        assert found.keys() == expected.keys()


def test_rows_are_written_after_that_many(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=3)
    counts = []
    for step in range(7):
        logger.log_metrics({"loss": 1.0}, step)
        counts.append(len(read(table(tmp_path))) if table(tmp_path).exists() else 0)
    assert counts == [0, 0, 3, 3, 3, 6, 6]
    logger.finalize("success")
    assert len(read(table(tmp_path))) == 7


def test_rows_of_a_slow_run_do_not_wait_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    logger = CSVLogger(tmp_path)
    for step in range(4):
        logger.log_metrics({"loss": 1.0}, step)
        now[0] += 20
    assert len(read(table(tmp_path))) == 3


def test_rows_that_nobody_saved_are_written_at_the_end(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    del logger
    gc.collect()
    assert len(read(table(tmp_path))) == 1
    code = """
        import sys
        from torchweft.loggers import CSVLogger
        logger = CSVLogger(sys.argv[1], version="ended")
        logger.log_metrics({"loss": 1.0}, 1)
        raise SystemExit(3)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], timeout=60)
    assert run.returncode == 3
    assert len(read(tmp_path / "torchweft_logs" / "ended" / "metrics.csv")) == 1


def test_a_run_that_is_continued_keeps_its_rows(tmp_path: Path) -> None:
    for step in (1, 2):
        logger = CSVLogger(tmp_path, version=0)
        logger.log_metrics({"loss": step, **({"acc": 1} if step == 2 else {})}, step)
        logger.finalize("success")
    assert table(tmp_path).read_text() == "step,loss,acc\n1,1,\n2,2,1\n"


@pytest.mark.parametrize("end", ["2,0.", "2,0.5", '2,"0'])
def test_half_a_row_is_not_continued(tmp_path: Path, end: str) -> None:
    path = table(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(f"step,loss\n1,0.5\n{end}")
    logger = CSVLogger(tmp_path, version=0)
    logger.log_metrics({"loss": 0.25}, 3)
    logger.save()
    assert path.read_text() == "step,loss\n1,0.5\n3,0.25\n"


def test_a_process_that_is_killed_leaves_whole_rows(tmp_path: Path) -> None:
    code = """
        import itertools, sys
        from torchweft.loggers import CSVLogger
        logger = CSVLogger(sys.argv[1], version=0, flush_logs_every_n_steps=1)
        logger.log_metrics({"loss": 0, "column 0": 0}, 0)
        print("begun", flush=True)
        for step in itertools.count():
            # Now and then a new column, until there are many.
            logger.log_metrics({"loss": step, f"column {step // 7 % 40}": step}, step)
    """
    seed = random.Random(0)
    before = 0
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), tmp_path], stdout=subprocess.PIPE
        ) as run:
            assert run.stdout is not None
            run.stdout.readline()
            time.sleep(seed.uniform(0.05, 0.5))
            run.send_signal(signal.SIGKILL)
        text = table(tmp_path).read_text()
        assert text.endswith("\n")
        rows = read(table(tmp_path))
        assert len(rows) > before
        before = len(rows)
        for row in rows:
            # A cell of its own, and no more and no fewer than there are columns.
            assert row["step"] == row["loss"] == row[f"column {int(row['step']) // 7 % 40}"]
            assert None not in row
            assert None not in row.values()


def test_a_disk_that_is_full_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    logger.log_metrics({"loss": 1.0}, 1)
    before = table(tmp_path).read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*metrics.csv'"):
            logger.log_metrics({"loss": 2.0}, 2)
        assert table(tmp_path).read_text() == before
        with pytest.raises(OSError, match="File too large"):
            logger.log_metrics({"new": 2.0}, 3)
        assert table(tmp_path).read_text() == before
        assert files(tmp_path) == {"torchweft_logs/version_0/metrics.csv"}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    # Nothing was lost meanwhile.
    logger.log_metrics({"loss": 4.0}, 4)
    assert [row["step"] for row in read(table(tmp_path))] == ["1", "2", "3", "4"]


def test_rows_before_a_fork_are_written_once(tmp_path: Path) -> None:
    code = """
        import os, sys
        from torchweft.loggers import CSVLogger
        logger = CSVLogger(sys.argv[1])
        logger.log_metrics({"loss": 1}, 1)
        for child in (1, 2):
            if not os.fork():
                if child == 2:
                    logger.log_metrics({"loss": 2}, 2)
                sys.exit()
            os.wait()
        logger.log_metrics({"loss": 3}, 3)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], check=True, timeout=60)
    assert table(tmp_path).read_text() == "step,loss\n1,1\n2,2\n3,3\n"


def test_a_logger_travels_without_what_it_holds(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    copied = pickle.loads(pickle.dumps(logger))
    copied.log_metrics({"loss": 2.0}, 2)
    copied.save()
    assert [row["step"] for row in read(table(tmp_path))] == ["2"]
    logger.save()
    assert [row["step"] for row in read(table(tmp_path))] == ["2", "1"]


def test_hyperparameters_are_json(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    params: dict[Any, Any] = {
        "lr": 0.1,
        "model": {"width": (8, 16), 3: None},
        "device": torch.device("cpu"),
        "name": "ü",
    }
    logger.log_hyperparams(params)
    path = table(tmp_path).with_name("hparams.json")
    assert json.loads(path.read_text()) == {
        "lr": 0.1,
        "model": {"width": [8, 16], "3": None},
        "device": "cpu",
        "name": "ü",
    }
    logger.log_hyperparams({"lr": 0.2}, {"best": 0.5}, 7)
    logger.save()
    assert json.loads(path.read_text()) == {"lr": 0.2}
    assert table(tmp_path).read_text() == "step,best\n7,0.5\n"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_metric_called_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^a metric is called 'step', which is the column of"):
        CSVLogger(tmp_path).log_metrics({"step": 1.0}, 1)


def test_a_wrong_number_of_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^CSVLogger\(flush_logs_every_n_steps=0\) is not a number of rows"
    ):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)
