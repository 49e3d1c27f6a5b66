"""What is offloaded to the host: DeepSpeed's own optimizer for it, and checkpoints out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deepspeed.ranks import data_of
from torchweft.errors import RankFailed
from torchweft.testing import run_ranks
from torchweft.testing.models import build, loss_of

STEPS = 20
OFFLOADED = [f"deepspeed_stage_{stage}_offload" for stage in (1, 2, 3)]


def optimizer_of(model: Any, own: bool) -> Any:
    """Two groups, of which one has no weight decay, as torch has it or DeepSpeed."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if "weight" in name], "weight_decay": 0.1},
        {"params": [p for name, p in named if "bias" in name], "lr": 0.005},
    ]
    made = DeepSpeedCPUAdam if own else torch.optim.AdamW
    return made(groups, lr=0.01, eps=1e-4, betas=(0.8, 0.9), weight_decay=0.0)


def trains(
    fabric: Any, own: bool, steps: int, load: Path | None = None, save: Path | None = None
) -> list[float]:
    """Losses of some steps, behind a checkpoint or before it."""
    plain = build("plain", 4 if load else 3)
    model, optimizer = fabric.setup(plain, optimizer_of(plain, own))
    state = {"model": model, "optimizer": optimizer}
    if load is not None:
        fabric.load(load, state)
    x, y = data_of(fabric)
    losses = []
    for _ in range(steps):
        loss = loss_of(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(fabric.all_reduce(loss.detach().clone())))
    if save is not None:
        fabric.save(save, state)
    return losses


@pytest.fixture(scope="module")
def right() -> list[float]:
    """Losses of one process with torch's optimizer."""
    told: list[list[float]] = run_ranks(1, trains, False, STEPS, strategy="single_device")
    return told[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", OFFLOADED)
def test_deepspeeds_optimizer_steps_as_torchs(strategy: str, right: list[float]) -> None:
    told = run_ranks(2, trains, True, STEPS, strategy=strategy, timeout=200)
    assert told[0] == pytest.approx(right, abs=1e-5)
    assert right[-1] < right[0] / 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_16_bits_it_steps_as_what_is_not_offloaded(stage: int) -> None:
    name = f"deepspeed_stage_{stage}"
    run: dict[str, Any] = {"precision": "bf16-mixed", "timeout": 200}
    told = run_ranks(2, trains, True, STEPS, strategy=f"{name}_offload", **run)[0]
    usual = run_ranks(2, trains, False, STEPS, strategy=name, **run)[0]
    assert told == pytest.approx(usual, rel=0.02)


@pytest.mark.parametrize("strategy", OFFLOADED)
def test_an_optimizer_that_deepspeed_refuses(strategy: str) -> None:
    words = (
        "strategy 'deepspeed' offloads the optimizer, and AdamW would step slowly on the host; "
        r"write deepspeed\.ops\.adam\.DeepSpeedCPUAdam\(model\.parameters\(\), …\) in its place, "
        "or zero_force_ds_cpu_optimizer=false to step all the same"
    )
    with pytest.raises(RankFailed, match=words):
        run_ranks(2, trains, False, 1, strategy=strategy)


# -- checkpoints -----------------------------------------------------------------------------------

#: Who else goes on from a checkpoint, and in how many processes.
OTHERS = [("single_device", 1), ("deepspeed_stage_3", 2)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", OFFLOADED)
def test_a_checkpoint_of_what_is_offloaded_is_anybodys(
    strategy: str, right: list[float], tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    run_ranks(2, trains, True, 5, None, path, strategy=strategy, timeout=200)
    for other, ranks in OTHERS:
        told = run_ranks(ranks, trains, False, 5, path, strategy=other)[0]
        assert told == pytest.approx(right[5:10], abs=1e-5), other


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("other", "ranks"), OTHERS)
def test_what_is_offloaded_goes_on_from_anybodys_checkpoint(
    other: str, ranks: int, right: list[float], tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    run_ranks(ranks, trains, False, 5, None, path, strategy=other)
    for strategy in OFFLOADED:
        told = run_ranks(2, trains, True, 5, path, strategy=strategy, timeout=200)[0]
        assert told == pytest.approx(right[5:10], abs=1e-5), strategy
