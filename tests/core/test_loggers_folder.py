"""Where loggers write: a folder for every run, made late, in one process."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from torchweft.errors import InvalidRequest, Misuse
from torchweft.loggers.folder import FolderLogger


class Notes(FolderLogger):
    """Notes what is to be written where."""

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        name: str | None = "exp",
        version: int | str | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(root_dir, name, version, prefix)
        self.rows: list[Any] = []

    def _write(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((metrics, step))

    def _write_hyperparams(
        self, params: Mapping[str, Any], metrics: dict[str, float], step: int
    ) -> None:
        self.rows.append((dict(params), metrics, step))


# -- folders -------------------------------------------------------------------------------------


def test_nothing_is_made_before_it_is_asked_for(tmp_path: Path) -> None:
    logger = Notes(tmp_path / "logs")
    assert logger.name == "exp"
    assert logger.root_dir == str(tmp_path / "logs")
    assert pickle.loads(pickle.dumps(logger)).name == "exp"
    assert not list(tmp_path.iterdir())
    assert logger.version == 0
    assert (tmp_path / "logs" / "exp" / "version_0").is_dir()


def test_every_run_gets_the_next_number(tmp_path: Path) -> None:
    (tmp_path / "exp" / "version_9").mkdir(parents=True)
    (tmp_path / "exp" / "version_10").mkdir()
    (tmp_path / "exp" / "version_10_old").mkdir()
    one, two = Notes(tmp_path), Notes(tmp_path)
    assert [one.version, two.version, one.version] == [11, 12, 11]
    assert one.log_dir == str(tmp_path / "exp" / "version_11")


@pytest.mark.parametrize(
    ("name", "version", "folder"),
    [
        ("exp", 3, "exp/version_3"),
        ("exp", "best", "exp/best"),
        ("a/b", "c/d", "a/b/c/d"),
        ("", 3, "version_3"),
        (None, "best", "best"),
        (None, None, "version_0"),
    ],
)
def test_the_folder_of_a_run(
    tmp_path: Path, name: str | None, version: int | str | None, folder: str
) -> None:
    assert Notes(tmp_path, name, version).log_dir == str(tmp_path / folder)


def test_the_folder_stays_where_it_was_when_the_script_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = Notes("logs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert logger.log_dir == str(tmp_path / "logs" / "exp" / "version_0")
    assert logger.root_dir == "logs"


def test_the_folder_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Notes("~/logs", version=1).log_dir == str(tmp_path / "logs/exp/version_1")


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    code = """
        import sys
        from torchweft.loggers import CSVLogger
        sys.stdin.read()
        for _ in range(20):
            print(CSVLogger(sys.argv[1], name="exp").version)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    runs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for run in runs:
        assert run.stdin is not None
        run.stdin.close()
        run.stdin = None
    taken = [int(line) for run in runs for line in run.communicate(timeout=60)[0].split()]
    assert sorted(taken) == list(range(80))


@pytest.mark.parametrize("address", ["s3://bucket/logs", "gs://bucket"])
def test_an_address_is_an_error(address: str) -> None:
    with pytest.raises(
        InvalidRequest,
        match=rf"^Notes\(root_dir='{address}'\) is an address; only paths of this machine's file",
    ):
        Notes(address)


@pytest.mark.parametrize("there", ["/etc", "../other", "a/../../b"])
def test_names_that_lead_out_of_the_folder_are_errors(tmp_path: Path, there: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^Notes\(name='{there}'\) leads out of root_dir"):
        Notes(tmp_path, name=there)
    with pytest.raises(InvalidRequest, match=rf"^Notes\(version='{there}'\) leads out of"):
        Notes(tmp_path, version=there)


# -- values --------------------------------------------------------------------------------------


def test_values_become_plain_numbers(tmp_path: Path) -> None:
    logger = Notes(tmp_path)
    logger.log_metrics(
        {
            "float": 0.5,
            "int": 2,
            "bool": True,
            "tensor": torch.tensor([1.5], requires_grad=True),
            "numpy": np.float32(2.5),
        },
        step=torch.tensor(3),  # type: ignore[arg-type]
    )
    ((metrics, step),) = logger.rows
    assert metrics == {"float": 0.5, "int": 2, "bool": 1, "tensor": 1.5, "numpy": 2.5}
    assert {type(value) for value in metrics.values()} == {float, int}
    assert (step, type(step)) == (3, int)


@pytest.mark.parametrize("value", ["0.5", None, [1.0], torch.ones(2), {"a": 1}, 1j])
def test_what_is_no_number_is_an_error_that_names_it(tmp_path: Path, value: object) -> None:
    kind = type(value).__name__
    with pytest.raises(
        InvalidRequest, match=rf"^the metric 'acc' is .*, a {kind}; loggers take single numbers$"
    ):
        Notes(tmp_path).log_metrics({"loss": 1.0, "acc": value}, step=1)  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["", "a\nb", "a\r", "\x1b[31m", 3, None])
def test_names_are_one_line_of_text(tmp_path: Path, name: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^the metric .* has no name that can be shown; name"):
        Notes(tmp_path).log_metrics({name: 1.0}, step=1)


def test_a_prefix_stands_before_every_name(tmp_path: Path) -> None:
    logger = Notes(tmp_path, prefix="train")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.log_hyperparams({"lr": 0.1}, {"acc": 0.5}, 2)
    assert logger.rows == [({"train-loss": 1.0}, 1), ({"lr": 0.1}, {"train-acc": 0.5}, 2)]


def test_a_step_that_is_left_out_is_the_one_after_the_last_of_the_metric(tmp_path: Path) -> None:
    logger = Notes(tmp_path)
    for _ in range(2):
        logger.log_metrics({"loss": 1.0})
        logger.log_metrics({"acc": 1.0})
    logger.log_metrics({"loss": 1.0}, step=10)
    logger.log_metrics({"loss": 1.0, "acc": 1.0})
    logger.log_metrics({"acc": 1.0})
    assert [step for _, step in logger.rows] == [0, 0, 1, 1, 10, 11, 12]


def test_no_metrics_are_no_row(tmp_path: Path) -> None:
    logger = Notes(tmp_path)
    logger.log_metrics({}, step=1)
    assert logger.rows == []


@dataclasses.dataclass
class Config:
    lr: float = 0.1


@pytest.mark.parametrize("params", [{"lr": 0.1}, argparse.Namespace(lr=0.1), Config()])
def test_hyperparameters_are_a_mapping_or_attributes(tmp_path: Path, params: object) -> None:
    logger = Notes(tmp_path)
    logger.log_hyperparams(params)
    assert logger.rows == [({"lr": 0.1}, {}, 0)]


@pytest.mark.parametrize("params", [None, 3, "lr=0.1", [("lr", 0.1)]])
def test_other_hyperparameters_are_an_error(tmp_path: Path, params: object) -> None:
    with pytest.raises(
        InvalidRequest,
        match=rf"^log_hyperparams\(\) was given .*, a {type(params).__name__}; pass a mapping or",
    ):
        Notes(tmp_path).log_hyperparams(params)


# -- ranks ---------------------------------------------------------------------------------------


@pytest.fixture
def rank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of which this process is the second."""
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)


@pytest.mark.usefixtures("rank_one")
def test_other_ranks_than_0_write_nothing(tmp_path: Path) -> None:
    logger = Notes(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    logger.finalize("success")
    assert logger.rows == []
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("rank_one")
def test_other_ranks_than_0_do_not_pick_a_version(tmp_path: Path) -> None:
    assert Notes(tmp_path, version=2).log_dir == str(tmp_path / "exp" / "version_2")
    with pytest.raises(
        Misuse,
        match=r"^the version of Notes was asked for on another rank than 0, and rank 0 picks it; "
        r"ask there and pass it on with fabric.broadcast\(\), or give one: Notes\(..., version=",
    ):
        _ = Notes(tmp_path).log_dir
