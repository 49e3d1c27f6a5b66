"""Strategy ``deepspeed`` in real ranks: what a step is, what is refused, and what is offloaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deepspeed import ranks
from tests.deepspeed.extensions import needs_drive
from torchweft.errors import RankFailed
from torchweft.testing import run_ranks
from torchweft.testing.models import Samples, build, loss_of, optimizer_for

SMALL = "stage3_param_persistence_threshold=0"
STAGE_3 = f"deepspeed_stage_3:{SMALL}"
STAGES = ["deepspeed:stage=0", "deepspeed_stage_1", "deepspeed_stage_2", STAGE_3]


def _alone() -> list[float]:
    """Losses of one process, as long as ranks train."""
    model = build("plain", 3)
    optimizer = optimizer_for(model, "adamw")
    data, losses = Samples(16), []
    for _ in range(ranks.STEPS):
        loss = loss_of(model(data.x), data.y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _norm(*shifts: float) -> float:
    model = build("plain", 3)
    data = Samples(16)
    for shift in shifts:
        loss_of(model(data.x + shift), data.y).backward()
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))


@pytest.mark.parametrize("strategy", STAGES)
def test_fifty_steps_end_where_one_process_ends(strategy: str) -> None:
    told = run_ranks(2, ranks.train_long, strategy=strategy)
    assert told[0] == pytest.approx(_alone(), abs=1e-5)


@pytest.mark.parametrize("strategy", ["deepspeed:stage=0", STAGE_3])
def test_two_backward_passes_make_one_step(strategy: str) -> None:
    assert run_ranks(2, ranks.twice, strategy=strategy)[0] == pytest.approx(_norm(0, 1), abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_second_backward_that_would_be_silently_wrong_is_refused(stage: int) -> None:
    words = (
        r"fabric\.backward\(\) came twice before optimizer\.step\(\), and at stage "
        rf"{stage} DeepSpeed would forget the gradients of the first; put every micro-batch of a "
        r"step into 'with fabric\.accumulate\(model, steps=…, index=…\):'"
    )
    with pytest.raises(RankFailed, match=words):
        run_ranks(2, ranks.twice, strategy=f"deepspeed_stage_{stage}")


@pytest.mark.parametrize("strategy", STAGES)
def test_gradients_are_forgotten_wherever_they_are(strategy: str) -> None:
    assert run_ranks(2, ranks.given_up, strategy=strategy)[0] == pytest.approx(_norm(0), abs=1e-5)


def test_a_step_in_the_middle_of_one_is_refused() -> None:
    with pytest.raises(RankFailed, match=r"step where acc\.should_step of fabric\.accumulate\(\)"):
        run_ranks(2, ranks.steps_in_the_middle, strategy="deepspeed_stage_2")


def test_a_step_without_gradients_changes_nothing() -> None:
    assert run_ranks(2, ranks.steps_without_gradients, strategy="deepspeed_stage_1") == [True] * 2


@pytest.mark.parametrize("strategy", STAGES)
def test_the_model_of_a_loss_is_found_by_its_graph(strategy: str) -> None:
    assert run_ranks(2, ranks.by_graph, strategy=strategy)[0] == [False, True]


@pytest.mark.parametrize("say", [True, False])
@pytest.mark.parametrize("strategy", STAGES)
def test_a_loss_may_lead_to_several_models(strategy: str, say: bool) -> None:
    run_ranks(2, ranks.two_models, say, strategy=strategy)


@pytest.mark.parametrize("strategy", STAGES)
def test_autograd_grad_is_no_backward_pass(strategy: str) -> None:
    assert run_ranks(2, ranks.differentiates, strategy=strategy)[0] > 0


@pytest.mark.parametrize("strategy", STAGES)
def test_a_model_without_an_optimizer_is_that_of_rank_0(strategy: str) -> None:
    with torch.no_grad():
        right = build("plain", 3)(Samples(4).x).sum().item()
    assert run_ranks(2, ranks.evaluates, strategy=strategy) == pytest.approx([right] * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "two optimizers",
            r"was given 2 optimizers \(SGD and AdamW\) for one Plain, and DeepSpeed has one for a",
        ),
        (
            "foreign parameters",
            r"SGD holds 4 parameter\(s\) that are not of the Plain, and DeepSpeed has an optimizer",
        ),
        ("nothing trains", "SGD holds no parameter that trains; leave it out of fabric.setup()"),
        ("several numbers", r"fabric\.backward\(loss\) takes a single number and retain_graph="),
        ("a closure", r"the engine of strategy 'deepspeed' steps without one; call fabric\.backw"),
        ("another norm", r"norm_type=1\.0\): DeepSpeed clips by the norm of order 2"),
        ("another group", "SGD has 2 groups of parameters that train, and had 1 when it was set"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(what: str, words: str) -> None:
    with pytest.raises(RankFailed, match=words):
        run_ranks(2, ranks.asks, what, strategy="deepspeed_stage_1")


def test_float16_is_refused_where_the_device_has_none() -> None:
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this processor has float16")
    words = (
        "precision '16-mixed' cannot be used with strategy 'deepspeed' on 'cpu': DeepSpeed says "
        "that type fp16 is not supported on your device"
    )
    with pytest.raises(RankFailed, match=words):
        run_ranks(1, ranks.train_long, strategy="deepspeed", precision="16-mixed")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_float16_with_a_loss_scale(stage: int, tmp_path: Path) -> None:
    # At stage 0 the first scale of DeepSpeed's is too large for the sum of two ranks' gradients.
    scale, option = (65536, "") if stage else (256, ":loss_scale=256")
    strategy = ranks.AnyNumbers(stage=stage)  # type: ignore[arg-type]
    told = run_ranks(
        2, ranks.train_scaled, tmp_path / "x.ckpt", strategy=strategy, precision=f"16-mixed{option}"
    )[0]
    model = build("plain", 3)
    optimizer = optimizer_for(model, "momentum")
    data = Samples(16)
    for step in range(4):
        loss = loss_of(model(data.x), data.y)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        assert told[step][0] == pytest.approx(loss.item(), abs=0.004)
        if step == 2:  # is left out
            assert not math.isfinite(told[step][1])
            continue
        assert told[step][1] == pytest.approx(norm.item(), abs=0.01)
        optimizer.step()
    # The second overflow is the first that counts.
    assert told[4] == scale
    assert told[5] == pytest.approx(loss_of(model(data.x[:8]), data.y[:8]).item(), abs=0.004)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STAGES)
def test_a_model_that_nobody_has_is_gone(strategy: str) -> None:
    assert run_ranks(2, ranks.lets_go, strategy=strategy) == [True, True]


def test_a_model_that_is_made_at_stage_3_is_nowhere_whole() -> None:
    whole = 24 * 4 * 2**20
    strategy = STAGE_3
    plain = run_ranks(2, ranks.made_wide, False, strategy=strategy)
    divided = run_ranks(2, ranks.made_wide, True, strategy=strategy)
    assert min(plain) > 0.9 * whole
    # Half of it, and the layer that is being made.
    assert max(divided) < 0.65 * whole


# -- offloading ------------------------------------------------------------------------------------


def test_an_optimizer_that_deepspeed_would_refuse_is_told_what_to_write() -> None:
    words = (
        "strategy 'deepspeed' offloads the optimizer, and AdamW would step slowly on the host; "
        r"write deepspeed\.ops\.adam\.DeepSpeedCPUAdam\(model\.parameters\(\), …\) in its place, "
        "or zero_force_ds_cpu_optimizer=false to step all the same"
    )
    with pytest.raises(RankFailed, match=words):
        run_ranks(2, ranks.train_long, strategy="deepspeed_stage_2_offload")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_of_torch_steps_on_the_host_where_that_is_asked_for(stage: int) -> None:
    strategy = f"deepspeed_stage_{stage}_offload:zero_force_ds_cpu_optimizer=false"
    told = run_ranks(2, ranks.train_long, strategy=strategy)
    assert told[0] == pytest.approx(_alone(), abs=1e-5)


@needs_drive
@pytest.mark.timeout(400)
def test_a_drive_holds_what_is_offloaded(tmp_path: Path) -> None:
    model, optimizer, x = ranks.wide()
    right = []
    for _ in range(4):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        right.append(loss.item())
    drive, file, folder = tmp_path / "drive", tmp_path / "x.ckpt", tmp_path / "x"
    strategy = f"deepspeed_stage_3_offload_nvme:nvme_path={drive},zero_force_ds_cpu_optimizer=false"
    for path in (file, folder):
        run: dict[str, Any] = {"strategy": strategy, "timeout": 300}
        losses, files = run_ranks(2, ranks.trains_wide, drive, path, False, **run)[0]
        assert losses == pytest.approx(right[-2:], rel=1e-5)
        assert files
        losses, _ = run_ranks(2, ranks.trains_wide, drive, path, True, **run)[0]
        assert losses == pytest.approx(right[-2:], rel=1e-5)
    losses, _ = run_ranks(2, ranks.trains_wide, drive, file, True, strategy="deepspeed_stage_1")[0]
    assert losses == pytest.approx(right[-2:], rel=1e-5)


# -- checkpoints -----------------------------------------------------------------------------------


def test_every_stage_writes_the_file_that_one_process_writes(tmp_path: Path) -> None:
    files = {}
    for strategy in ["single_device", *STAGES]:
        path = tmp_path / f"{len(files)}.ckpt"
        n = 1 if strategy == "single_device" else 2
        run_ranks(n, ranks.saves, path, strategy=strategy)
        files[strategy] = torch.load(path, weights_only=True)
    right = files.pop("single_device")
    for found in files.values():
        assert list(found["model"]) == list(right["model"])
        for name, value in right["model"].items():
            torch.testing.assert_close(found["model"][name], value, atol=1e-5, rtol=0)
        shared = found["model"]["up.weight"], found["model"]["down.weight"]
        assert shared[0].data_ptr() == shared[1].data_ptr()
        assert found["optimizer"]["param_groups"] == right["optimizer"]["param_groups"]
        assert found["optimizer"]["state"].keys() == right["optimizer"]["state"].keys()
        for name, slots in right["optimizer"]["state"].items():
            for key, value in slots.items():
                mine = found["optimizer"]["state"][name][key]
                torch.testing.assert_close(mine, value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", STAGES)
def test_a_checkpoint_of_another_model_is_refused(strategy: str, tmp_path: Path) -> None:
    words = r"'weight' is \(5, 6\) in the checkpoint and \(4, 6\) in the model"
    with pytest.raises(RankFailed, match=words):
        run_ranks(2, ranks.loads_other, tmp_path / "x.ckpt", strategy=strategy)


def test_the_state_of_a_divided_model_names_fabric_save() -> None:
    with pytest.raises(RankFailed, match=r"call fabric\.save\(path, \{'model': model\}\)"):
        run_ranks(2, _state_dict, strategy="deepspeed_stage_3")


def _state_dict(fabric: object) -> None:
    ranks.set_up(fabric)[0].state_dict()
