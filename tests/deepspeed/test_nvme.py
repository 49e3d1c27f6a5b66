"""What is offloaded to a drive, and what is said beforehand where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.deepspeed import ranks
from tests.deepspeed.extensions import needs_drive
from torchweft import Fabric
from torchweft.errors import IncompatiblePlan, RankFailed
from torchweft.testing import run_ranks
from torchweft_deepspeed.requests import of_one_model

STEPS = 4


def wide() -> nn.Module:
    """Layers of which half is large enough for DeepSpeed to write it: a million bytes."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh())


def _batch(fabric: Any, step: int) -> Tensor:
    """This rank's part of eight rows."""
    torch.manual_seed(step)
    each = 8 // fabric.world_size
    return torch.randn(8, 1024)[fabric.global_rank * each : (fabric.global_rank + 1) * each]


def _optimizer(model: nn.Module, own: bool) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    made = DeepSpeedCPUAdam if own else torch.optim.AdamW
    return made(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.1)


def trains(fabric: Any, own: bool, models: int = 1, divided: bool = False) -> list[float]:
    """Losses and norms of models by turns, in steps of two micro-batches."""
    made = []
    for _ in range(models):
        with fabric.init_module() if divided else nullcontext():
            made.append(wide())
    ready = [fabric.setup(each, _optimizer(each, own)) for each in made]
    told = []
    for step in range(STEPS):
        for model, optimizer in ready:
            if step == 1:
                fabric.backward(model(100 * _batch(fabric, 50)).square().mean(), model=model)
                optimizer.zero_grad()
            for index in range(2):
                with fabric.accumulate(model, steps=2, index=index):
                    loss = model(_batch(fabric, 2 * step + index)).square().mean()
                    fabric.backward(loss, model=model)
                told.append(float(fabric.all_reduce(loss.detach().clone())))
            told.append(float(fabric.clip_gradients(model, optimizer, max_norm=0.01)))
            optimizer.step()
            optimizer.zero_grad()
    return told


def trains_on(fabric: Any, drive: Path, *options: Any) -> tuple[list[float], list[str]]:
    """The same, and what this rank has on the drive."""
    told = trains(fabric, *options)
    files = drive.rglob(f"rank{fabric.global_rank}/*.swp")
    return told, sorted({path.relative_to(drive).parts[0] for path in files})


@pytest.fixture(scope="module")
def right() -> list[float]:
    """One process with torch's optimizer."""
    told: list[list[float]] = run_ranks(1, trains, False, strategy="single_device")
    return told[0]


def _by_turns(told: list[float], models: int) -> list[float]:
    """What as many equal models tell."""
    steps = [told[3 * step : 3 * step + 3] for step in range(STEPS)]
    return [number for step in steps for _ in range(models) for number in step]


@needs_drive
@pytest.mark.timeout(500)
def test_deepspeeds_optimizer_steps_from_a_drive(right: list[float], tmp_path: Path) -> None:
    drive = tmp_path / "new" / "drive"
    strategy = f"deepspeed_stage_3_offload_nvme:nvme_path={drive}"
    for told, folders in run_ranks(2, trains_on, drive, True, strategy=strategy, timeout=400):
        assert told == pytest.approx(right, rel=1e-4)
        assert folders == ["model0"]


@needs_drive
@pytest.mark.timeout(500)
@pytest.mark.parametrize("divided", [False, True])
def test_each_model_has_a_folder_of_the_drive(
    divided: bool, right: list[float], tmp_path: Path
) -> None:
    strategy = f"deepspeed_stage_3_offload_nvme:nvme_path={tmp_path}"
    strategy += ",zero_force_ds_cpu_optimizer=false"
    told = run_ranks(2, trains_on, tmp_path, False, 2, divided, strategy=strategy, timeout=400)
    for numbers, folders in told:
        assert numbers == pytest.approx(_by_turns(right, 2), rel=1e-4)
        # What is divided as it is made is on the drive before there is an engine.
        models = ["model0", "model1", "model2", "model3"]
        assert folders == (models if divided else models[:2])


def steps_with_adagrad(fabric: Any) -> None:
    plain = wide()
    fabric.setup(plain, torch.optim.Adagrad(plain.parameters()))


@needs_drive
def test_an_optimizer_that_has_state_from_the_start_is_refused(tmp_path: Path) -> None:
    words = (
        "strategy 'deepspeed' was asked for offload_optimizer='nvme', and the state that Adagrad "
        "starts with is made by DeepSpeed when the parameters are on the drive already, so that it "
        "is empty; write offload_optimizer='cpu', or use torch.optim.AdamW"
    )
    strategy = f"deepspeed_stage_3_offload_nvme:nvme_path={tmp_path}"
    with pytest.raises(RankFailed, match=words):
        run_ranks(2, steps_with_adagrad, strategy=strategy)


def test_the_folder_is_that_of_one_model() -> None:
    drive = {"device": "nvme", "nvme_path": "/drive"}
    zero = {"stage": 3, "offload_optimizer": drive, "offload_param": {"device": "cpu"}}
    config = {"zero_optimization": zero, "steps_per_print": 5}
    assert of_one_model(config, 1) == {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/drive/model1"},
            "offload_param": {"device": "cpu"},
        },
        "steps_per_print": 5,
    }
    assert drive["nvme_path"] == "/drive"


# -- what is said beforehand -----------------------------------------------------------------------


def test_a_drive_is_named_where_a_run_is_planned(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "below"
    words = (
        f"strategy 'deepspeed' was given nvme_path='{path}', and '{tmp_path / 'file'}' is not a "
        "folder; name a folder that this user may write"
    )
    strategy = f"deepspeed_stage_3_offload_nvme:nvme_path={path}"
    with pytest.raises(IncompatiblePlan) as refused:
        Fabric(accelerator="cpu", devices=2, strategy=strategy)
    # Once, though optimizer and parameters are to go there.
    assert str(refused.value).count(words) == 1
    assert _plan(strategy).count(words) == 1


@needs_drive
def test_a_drive_on_which_no_file_can_be_made() -> None:
    """What permissions do not say; whoever may write anywhere is told in the ranks."""
    words = (
        "strategy 'deepspeed' was given nvme_path='/proc/drive', and (no file can be made there: "
        ".*|'/proc' cannot be written); name a folder that this user may write"
    )
    with pytest.raises((RankFailed, IncompatiblePlan), match=words):
        strategy = "deepspeed_stage_3_offload_nvme:nvme_path=/proc/drive"
        run_ranks(1, ranks.set_up, strategy=strategy)


def test_a_drive_that_is_not_named() -> None:
    told = _plan("deepspeed_stage_3_offload_nvme")
    for option in ("offload_optimizer", "offload_parameters"):
        assert (
            f"strategy 'deepspeed' was asked for {option}='nvme', and no folder of the drive was "
            "named; write nvme_path='/the/folder' with it"
        ) in told


def _plan(strategy: str) -> str:
    """What the command says to a plan that cannot be."""
    flags = ["--accelerator", "cpu", "--devices", "2", "--strategy", strategy]
    return _refused([sys.executable, "-m", "torchweft", "plan", *flags])


def _refused(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stdout
    return done.stderr


#: Asks twice, as a user who may not write everywhere: the first time everything is imported.
ASKS = """
import os, sys
from torchweft import Fabric

def ask(path):
    options = {"stage": 3, "offload_parameters": "nvme", "nvme_path": path}
    named = ",".join(f"{name}={value}" for name, value in options.items())
    return Fabric(accelerator="cpu", devices=2, strategy=f"deepspeed:{named}")

ask(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)
try:
    ask(sys.argv[2])
except Exception as error:
    sys.exit(str(error))
"""


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that is read alone, in one that everybody may look into."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o555)
        yield Path(folder)


@needs_drive
def test_a_drive_that_this_user_may_not_write(locked: Path, tmp_path: Path) -> None:
    path = locked / "below"
    assert (
        f"strategy 'deepspeed' was given nvme_path='{path}', and '{locked}' cannot be written; "
        "name a folder that this user may write"
    ) in _refused([sys.executable, "-c", ASKS, str(tmp_path), str(path)])


def test_an_extension_that_came_with_deepspeed_needs_no_header(tmp_path: Path) -> None:
    """A package of that name, with the file that ``DS_BUILD_AIO=1 pip install`` makes."""
    code = (
        "from torchweft_deepspeed import requests; requests._AIO = 'no-such-header.h'; "
        "print(requests._has_aio())"
    )
    (tmp_path / "deepspeed" / "ops" / "aio").mkdir(parents=True)
    (tmp_path / "deepspeed" / "__init__.py").write_text("")
    for built in (False, True):
        if built:
            (tmp_path / "deepspeed/ops/aio/async_io_op.cpython-311-x86_64-linux-gnu.so").touch()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        assert done.stdout == f"{built}\n"
