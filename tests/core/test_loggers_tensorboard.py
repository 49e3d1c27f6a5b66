"""Event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import gc
import importlib.util
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import distributed, nn

from torchweft import Fabric
from torchweft.errors import Misuse, NotAvailable
from torchweft.loggers import TensorBoardLogger


def events(folder: Path | str) -> Any:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def scalars(folder: Path | str, metric: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(metric)]


def test_metrics_are_scalars(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fabric = Fabric(accelerator="cpu", loggers=logger)
    assert not list(tmp_path.iterdir())
    for step in range(3):
        fabric.log_dict({"train/loss": torch.tensor(0.5 / 2**step), "epoch": step}, step=step * 10)
    logger.save()
    folder = tmp_path / "torchweft_logs" / "version_0"
    assert logger.log_dir == str(folder)
    assert scalars(folder, "train/loss") == [(0, 0.5), (10, 0.25), (20, 0.125)]
    assert scalars(folder, "epoch") == [(0, 0.0), (10, 1.0), (20, 2.0)]
    logger.finalize("success")


def test_values_after_the_end_are_in_a_further_file(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, filename_suffix=".mine")
    for step in range(2):
        logger.log_metrics({"loss": step}, step)
        logger.finalize("success")
    assert scalars(logger.log_dir, "loss") == [(0, 0.0), (1, 1.0)]
    files = list(Path(logger.log_dir).iterdir())
    assert len(files) == 2
    assert all(file.name.endswith(".mine") for file in files)
    logger.finalize("success")


def test_events_that_nobody_saved_are_written_at_the_end(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    folder = logger.log_dir
    del logger
    gc.collect()
    assert scalars(folder, "loss") == [(1, 1.0)]
    code = """
        import sys
        from torchweft.loggers import TensorBoardLogger
        logger = TensorBoardLogger(sys.argv[1], version="ended")
        logger.log_metrics({"loss": 2.0}, 1)
        raise SystemExit(3)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], timeout=90)
    assert run.returncode == 3
    assert scalars(tmp_path / "torchweft_logs" / "ended", "loss") == [(1, 2.0)]


def test_a_run_that_went_back_leaves_out_what_it_had(tmp_path: Path) -> None:
    for start, purge_step in ((0, None), (2, 2)):
        logger = TensorBoardLogger(tmp_path, version=0, purge_step=purge_step)
        for step in range(start, 4):
            logger.log_metrics({"loss": start}, step)
        logger.finalize("success")
    assert scalars(logger.log_dir, "loss") == [(0, 0.0), (1, 0.0), (2, 2.0), (3, 2.0)]


def test_a_folder_in_the_folder_of_the_run(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="exp", version="best", sub_dir="fold_1")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("success")
    assert logger.log_dir == str(tmp_path / "exp" / "best" / "fold_1")
    assert scalars(logger.log_dir, "loss") == [(1, 1.0)]


# -- hyperparameters -----------------------------------------------------------------------------


def start_of_session(folder: str) -> dict[str, Any]:
    content = events(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    data = plugin_data_pb2.HParamsPluginData.FromString(content)
    found = {}
    for name, value in data.session_start_info.hparams.items():
        found[name] = getattr(value, value.WhichOneof("kind"))
    return found


def test_hyperparameters(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams(
        {"lr": 0.5, "model": {"width": 8, "act": {"name": "relu"}}, "flag": True, "shape": [1, 2]}
    )
    assert start_of_session(logger.log_dir) == {
        "lr": 0.5,
        "model/width": 8.0,
        "model/act/name": "relu",
        "flag": True,
        "shape": "[1, 2]",
    }
    assert scalars(logger.log_dir, "hp_metric") == [(0, -1.0)]


def test_hyperparameters_with_metrics(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.5})
    assert start_of_session(logger.log_dir) == {"lr": 0.5}
    assert events(logger.log_dir).Tags()["scalars"] == []
    logger.log_hyperparams({"lr": 0.25}, {"acc": 0.75}, 7)
    assert scalars(logger.log_dir, "acc") == [(7, 0.75)]


def test_hyperparameters_leave_no_thread(tmp_path: Path) -> None:
    # Recorded above fabric.launch(), they would keep the process from being forked.
    before = threading.enumerate()
    TensorBoardLogger(tmp_path).log_hyperparams({"lr": 0.5})
    assert threading.enumerate() == before


# -- more than numbers ---------------------------------------------------------------------------


def test_what_else_tensorboard_shows(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.experiment.add_text("note", "hello", 1)
    logger.experiment.add_image("picture", torch.zeros(3, 4, 4), 1)
    logger.finalize("success")
    tags = events(logger.log_dir).Tags()
    assert tags["images"] == ["picture"]
    assert tags["tensors"] == ["note/text_summary"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's tracer warns about itself
def test_the_graph_of_a_model(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(
        Misuse, match=r"^log_graph\(\) traces the model with an input, and has none"
    ):
        logger.log_graph(model)
    logger.log_graph(model, torch.ones(1, 2))
    model.example_input_array = torch.ones(1, 2)
    logger.log_graph(model)
    logger.finalize("success")
    names = {node.name for node in events(logger.log_dir).Graph().node}
    assert any("Linear" in name for name in names)


# -- processes -----------------------------------------------------------------------------------


def test_a_logger_travels_without_its_writer(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix="p")
    logger.log_metrics({"loss": 1.0}, 1)
    copied = pickle.loads(pickle.dumps(logger))
    copied.log_metrics({"loss": 2.0}, 2)
    for one in (logger, copied):
        one.finalize("success")
    assert scalars(logger.log_dir, "p-loss") == [(1, 1.0), (2, 2.0)]


def test_a_process_that_was_forked_writes_a_file_of_its_own(tmp_path: Path) -> None:
    code = """
        import os, sys
        from torchweft.loggers import TensorBoardLogger
        logger = TensorBoardLogger(sys.argv[1])
        logger.log_metrics({"loss": 1}, 1)
        logger.save()
        if not os.fork():
            logger.log_metrics({"loss": 2}, 2)
            logger.finalize("success")
            os._exit(0)
        assert os.wait()[1] == 0
        logger.log_metrics({"loss": 3}, 3)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    subprocess.run(command, check=True, timeout=90)
    folder = tmp_path / "torchweft_logs" / "version_0"
    assert len(list(folder.iterdir())) == 2
    assert sorted(scalars(folder, "loss")) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_other_ranks_than_0_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.log_hyperparams({"lr": 0.5})
    logger.log_graph(nn.Linear(2, 2))
    logger.save()
    logger.finalize("success")
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        Misuse,
        match=r"^TensorBoardLogger.experiment was asked for on another rank than 0, and rank 0 "
        r"alone writes; put the line under 'if fabric.is_global_zero:'$",
    ):
        _ = logger.experiment


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(
        NotAvailable,
        match=r"^TensorBoardLogger needs the package tensorboard, which is not installed; try: "
        r'pip install "torchweft\[logs\]"$',
    ):
        TensorBoardLogger(tmp_path)
