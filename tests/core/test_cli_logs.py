"""``torchweft logs``: the table, the curves, the picture, and what is said without them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from click.testing import CliRunner, Result

from torchweft.cli.logs import logs
from torchweft.errors import InvalidRequest, NotAvailable, TorchweftError
from torchweft.loggers import CSVLogger, TensorBoardLogger

CODE = "from torchweft.cli.logs import logs; logs()"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs by one logger, one of them with values that are not finite."""
    folder = tmp_path / "runs"
    for run in range(2):
        logger = CSVLogger(folder, name=None)
        for step in range(1, 41):
            value = math.nan if run == 1 and step in (3, 40) else 1 / step + run
            metrics = {"train/loss": value}
            if step % 10 == 0:
                metrics["acc $x$"] = step / 40
            logger.log_metrics(metrics, step)
        logger.finalize("success")
    return folder


def invoke(*arguments: str | Path, raises: bool = False) -> Result:
    result = CliRunner().invoke(logs, [str(argument) for argument in arguments])
    if not raises and result.exception is not None and result.exit_code == 1:
        raise result.exception
    return result


def on_terminal(*arguments: str | Path, columns: int = 90) -> str:
    reader, writer = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CODE, *map(str, arguments)],
        env={**kept, "COLUMNS": str(columns), "TERM": "xterm-256color"},
        stdin=writer,
        stdout=writer,
        stderr=writer,
    ) as process:
        os.close(writer)
        pieces = []
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # Linux says so when the other side was closed
                break
            pieces.append(piece)
        os.close(reader)
        assert process.wait(timeout=60) == 0, pieces
    text = b"".join(pieces).decode().replace("\r\n", "\n")
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def size_of(picture: Path) -> tuple[int, int]:
    height, width, _ = matplotlib.image.imread(picture).shape
    return width, height


def colours_of(picture: Path) -> int:
    pixels = matplotlib.image.imread(picture)[..., :3].reshape(-1, 3)
    return len({tuple(pixel) for pixel in pixels.round(1).tolist()})


# -- in a pipe -----------------------------------------------------------------------------------


def test_in_a_pipe_each_metric_is_a_line(runs: Path) -> None:
    result = invoke(runs)
    assert result.exit_code == 0
    lines = [re.split(r"\s{2,}", line) for line in result.stdout.splitlines()]
    assert lines == [
        ["RUN", "FROM", "METRIC", "LAST", "MIN", "MAX", "VALUES", "NOTE"],
        ["version_0", "csv", "train/loss", "0.025 @ 40", "0.025 @ 40", "1 @ 1", "40"],
        ["version_0", "csv", "acc $x$", "1 @ 40", "0.25 @ 10", "1 @ 40", "4"],
        [
            *("version_1", "csv", "train/loss", "nan @ 40", "1.0256 @ 39", "2 @ 1", "40"),
            "2 not finite",
        ],
        ["version_1", "csv", "acc $x$", "1 @ 40", "0.25 @ 10", "1 @ 40", "4"],
        [f"picture: {runs / 'metrics.png'}"],
    ]


def test_the_picture_has_a_part_for_each_metric(runs: Path, tmp_path: Path) -> None:
    invoke(runs)
    both = size_of(runs / "metrics.png")
    assert not (tmp_path / "one.png").exists()
    invoke(runs, "--metric", "train/loss", "--png", tmp_path / "one.png")
    one = size_of(tmp_path / "one.png")
    assert both == (2 * one[0], one[1])
    assert colours_of(tmp_path / "one.png") > 10


def test_the_picture_is_no_log(runs: Path) -> None:
    assert invoke(runs).stdout == invoke(runs).stdout


def test_metrics_are_chosen_by_name_or_pattern(runs: Path) -> None:
    for wanted in ("train/loss", "train*", "*loss"):
        lines = invoke(runs, "--metric", wanted).stdout.splitlines()
        assert len(lines) == 4
        assert all("train/loss" in line for line in lines[1:3])
    assert len(invoke(runs, "--metric", "acc*", "--metric", "train*").stdout.splitlines()) == 6


def test_both_loggers_of_a_run_are_told_apart(tmp_path: Path) -> None:
    for logger in (CSVLogger(tmp_path, version=0), TensorBoardLogger(tmp_path, version=0)):
        logger.log_metrics({"loss": 0.5}, 1)
        logger.finalize("success")
    lines = invoke(tmp_path).stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["torchweft_logs/version_0", "csv", "loss"],
        ["torchweft_logs/version_0", "tensorboard", "loss"],
    ]


def test_half_a_file_is_read_and_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.")
    result = invoke(tmp_path)
    assert result.exit_code == 0
    assert "0.5 @ 1" in result.stdout
    assert result.stderr == (
        f"note: {tmp_path / 'metrics.csv'} ends within a line, which was left out\n"
    )


def test_only_values_that_are_not_finite(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n1,nan\n2,inf\n")
    line = invoke(tmp_path).stdout.splitlines()[1]
    assert line.split("  ")[0] == "."
    assert re.split(r"\s{2,}", line)[3:] == ["inf @ 2", "none", "none", "2", "2 not finite"]
    assert (tmp_path / "metrics.png").stat().st_size > 0


# -- as JSON -------------------------------------------------------------------------------------


def document(*arguments: str | Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    parsed: dict[str, Any] = json.loads(invoke(*arguments, "--json").stdout, parse_constant=refuse)
    return parsed


def test_as_json(runs: Path) -> None:
    found = document(runs)
    assert [metric["metric"] for metric in found["metrics"]] == ["train/loss", "acc $x$"] * 2
    assert found["metrics"][2] == {
        "run": "version_1",
        "source": "csv",
        "metric": "train/loss",
        "count": 40,
        "nonfinite": 2,
        "last": None,
        "last_step": 40,
        "min": 1 / 39 + 1,
        "min_step": 39,
        "max": 2.0,
        "max_step": 1,
    }
    assert (found["notes"], found["png"]) == ([], None)
    assert not (runs / "metrics.png").exists()
    assert document(runs, "--png", runs / "mine.png")["png"] == str(runs / "mine.png")
    assert (runs / "mine.png").exists()


def test_the_help_names_every_key(runs: Path) -> None:
    text = invoke("--help").stdout
    found = document(runs)
    assert set(re.findall(r'"(\w+)"', text)) == {*found, *found["metrics"][0]}


# -- on a terminal -------------------------------------------------------------------------------


def test_on_a_terminal_curves_are_drawn(runs: Path) -> None:
    shown = on_terminal(runs)
    head, *rest = shown.split("\n\n")
    # What all rows share is no column.
    assert re.split(r"\s{2,}", head.splitlines()[0].strip())[:3] == ["Run", "Metric", "Last"]
    assert len(rest) == 3
    for plot, metric in zip(rest, ("train/loss", "acc $x$"), strict=False):
        lines = plot.splitlines()
        assert lines[0].strip() == metric
        assert "version_0" in plot
        assert "version_1" in plot
        assert len(re.findall(r"[\u2801-\u28ff]", plot)) > 40
        assert max(map(len, lines)) <= 90
    assert rest[2] == f"picture: {runs / 'metrics.png'}\n"


def test_a_terminal_that_is_narrow(runs: Path) -> None:
    shown = on_terminal(runs, "--metric", "train*", columns=40)
    plot = shown.split("\n\n")[1]
    assert max(map(len, plot.splitlines())) <= 40


def test_of_many_metrics_some_are_drawn(tmp_path: Path) -> None:
    names = [f"m{place}" for place in range(8)]
    (tmp_path / "metrics.csv").write_text(
        f"step,{','.join(names)}\n1{',1' * 8}\n2{',nan' * 8}\n3{',2' * 8}\n"
    )
    shown = on_terminal(tmp_path)
    drawn = [line.strip() for line in shown.splitlines() if line.strip() in names]
    assert drawn == names[:6]
    assert "2 more metrics are in the picture; see --metric" in shown
    # Without other runs there is nothing to tell apart.
    assert "⢕" not in shown


# -- errors --------------------------------------------------------------------------------------


def error(*arguments: str | Path) -> BaseException:
    result = invoke(*arguments, raises=True)
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit), result.output
    return result.exception


def test_a_folder_without_logs(tmp_path: Path) -> None:
    found = error(tmp_path)
    assert isinstance(found, InvalidRequest)
    assert str(found) == (
        f"there are no metrics below '{tmp_path}': neither a metrics.csv of CSVLogger nor an event "
        "file of TensorBoard with values in it; name the root_dir of a logger, or the folder of "
        "one of its runs"
    )
    (tmp_path / "metrics.csv").write_text("name,price\na,1\n")
    assert "with values in it; " + str(tmp_path) in str(error(tmp_path))
    assert "has no column 'step'" in str(error(tmp_path))
    assert not (tmp_path / "metrics.png").exists()


def test_no_folder_at_all(tmp_path: Path) -> None:
    result = invoke(tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere' does not exist" in result.stderr


def test_a_metric_that_is_not_there(runs: Path) -> None:
    found = error(runs, "--metric", "train/los")
    assert isinstance(found, InvalidRequest)
    assert str(found) == (
        f"no metric below '{runs}' is called 'train/los'; did you mean 'train/loss'? there are: "
        "train/loss, acc $x$"
    )
    assert "is called 'zzz'; there are: train/loss, acc $x$" in str(error(runs, "--metric", "zzz"))


def test_a_picture_that_cannot_be_written(runs: Path) -> None:
    found = error(runs, "--png", runs / "nowhere" / "x.png")
    assert type(found) is TorchweftError
    assert str(found) == (
        f"cannot write the picture to '{runs}/nowhere/x.png': No such file or directory; name "
        "another place with --png"
    )


@pytest.mark.parametrize(
    ("package", "what"),
    [("matplotlib", "writes the picture"), ("plotext", "draws curves in the terminal")],
)
def test_without_the_libraries(
    runs: Path, monkeypatch: pytest.MonkeyPatch, package: str, what: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    monkeypatch.setattr("torchweft.cli.logs.on_terminal", lambda: True)
    found = error(runs)
    assert isinstance(found, NotAvailable)
    assert str(found) == (
        f'the package {package}, which {what}, is not installed; try: pip install "torchweft[logs]"'
    )
    assert len(document(runs)["metrics"]) == 4
