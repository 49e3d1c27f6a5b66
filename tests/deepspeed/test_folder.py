"""A checkpoint as a folder, which is in DeepSpeed's own layout, and folders of DeepSpeed's own."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.deepspeed import folders
from torchweft.cli.checkpoint import checkpoint
from torchweft.errors import RankFailed
from torchweft.testing import run_ranks

STAGES = {
    1: "deepspeed_stage_1",
    2: "deepspeed_stage_2",
    3: "deepspeed_stage_3:stage3_param_persistence_threshold=0",
}


WAY_OUT = (
    "load them with strategy 'deepspeed_stage_2' on 2 devices and save to a path with a suffix, "
    "such as 'x.ckpt', which every stage reads on any number of devices"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of stage 2, by two ranks."""
    path = tmp_path_factory.mktemp("saved [1]") / "step3"
    run_ranks(2, folders.saves, path, strategy=STAGES[2])
    return path


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_next_losses_are_the_same(tmp_path: Path, stage: int, precision: str) -> None:
    """Of all that is kept: groups, their rates, shared and frozen parameters, and buffers."""
    run: dict[str, Any] = {"strategy": STAGES[stage], "precision": precision}
    path = tmp_path / "step3"
    right = run_ranks(2, folders.saves, path, **run)[0]
    assert run_ranks(2, folders.goes_on, path, **run)[0] == right
    assert run_ranks(2, folders.goes_on, path.with_suffix(".ckpt"), **run)[0] == right


def test_one_process_is_enough(tmp_path: Path) -> None:
    right = run_ranks(1, folders.saves, tmp_path / "x", strategy=STAGES[2])
    assert run_ranks(1, folders.goes_on, tmp_path / "x", strategy=STAGES[2]) == right


def test_the_layout_is_deepspeed_s(saved: Path, tmp_path: Path) -> None:
    """Its own script makes of it what the other form of a checkpoint holds."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    names = sorted(str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file())
    step = "parts_0/global_step3"
    assert names == [
        ".metadata",
        f"{step}/mp_rank_00_model_states.pt",
        f"{step}/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        f"{step}/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "parts_0/latest",
        "parts_0/zero_to_fp32.py",
        "torchweft.json",
        "values.ckpt",
    ]
    # Which reads no path with brackets.
    shutil.copytree(saved, tmp_path / "x")
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "x" / "parts_0"))
    right = torch.load(saved.with_suffix(".ckpt"), weights_only=True)["parts"][0]
    assert set(found) == set(right)
    for name, value in right.items():
        torch.testing.assert_close(found[name], value)
    assert set(json.loads((saved / "torchweft.json").read_text())["files"]) == {
        name for name in names if name != "torchweft.json"
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_the_model_alone(tmp_path: Path, stage: int) -> None:
    run_ranks(2, folders.saves, tmp_path / "x", strategy=STAGES[stage])
    left = run_ranks(2, folders.loads_the_model, tmp_path / "x", strategy=STAGES[stage])
    layout = f"layout 'deepspeed', read by strategy 'deepspeed_stage_{stage}' in 2 processes"
    assert left == [["scheduler", "step", layout]] * 2


@pytest.mark.parametrize(
    ("ranks", "stage", "precision", "words"),
    [
        (1, 2, "32-true", f"the number of processes is 2 there and 1 here; {WAY_OUT}"),
        (2, 3, "32-true", f"the stage is 2 there and 3 here; {WAY_OUT}"),
        (2, 2, "bf16-mixed", f"the precision's block is none there and bf16 here; {WAY_OUT}"),
        (2, 0, "32-true", "into a model that was set up with its optimizer, at stage 1, 2 or 3"),
    ],
)  # fmt: skip
def test_another_plan_is_refused(
    saved: Path, ranks: int, stage: int, precision: str, words: str
) -> None:
    strategy = STAGES.get(stage, "deepspeed:stage=0")
    told = run_ranks(ranks, folders.is_refused, saved, "", strategy=strategy, precision=precision)
    assert words in told[0]
    assert told[0].partition("'")[2].startswith(str(saved))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another optimizer", "the optimizer is AdamW there and SGD here; load them with"),
        ("another model", "the checkpoint is of another model: "),
        ("the optimizer alone", "together with its model; load both: fabric.load(path, {'model'"),
        (
            "another's optimizer",
            "was not set up with it here; call model, optimizer = fabric.setup",
        ),
        ("not set up", "which fills models that were set up, and the Shared was not; call fabric"),
    ],
)
def test_what_does_not_fit_is_refused(saved: Path, what: str, words: str) -> None:
    told = run_ranks(2, folders.is_refused, saved, what, strategy=STAGES[2])
    assert words in told[0]
    assert words in told[1]


def test_several_models(tmp_path: Path) -> None:
    """Each pair has a folder; a model without its optimizer is written by its names."""
    right = run_ranks(2, folders.two, tmp_path / "x", False, strategy=STAGES[3])
    assert run_ranks(2, folders.two, tmp_path / "x", True, strategy=STAGES[3]) == right
    layouts = json.loads((tmp_path / "x" / "torchweft.json").read_text())["layouts"]
    assert {name: each["layout"] for name, each in layouts.items()} == {
        "a_b": "deepspeed",
        "a_b_": "deepspeed",
    }


def test_a_filter_is_for_what_has_names(tmp_path: Path) -> None:
    words = (
        "filter is given for state['model'], and a folder holds it in the layout 'deepspeed', "
        "which has no entries to choose from; save to a path with a suffix, such as 'x.ckpt'"
    )
    assert words in run_ranks(1, folders.cannot_filter, tmp_path / "x", strategy=STAGES[1])[0]
    names = run_ranks(1, folders.filters, tmp_path / "x", strategy=STAGES[1])[0]
    assert names
    assert all("bias" in name for name in names)


def test_a_rank_that_cannot_write_is_told_to_all(tmp_path: Path) -> None:
    told = run_ranks(2, folders.fails_to_write, tmp_path / "x", strategy=STAGES[2])
    assert told == [f"cannot save to '{tmp_path / 'x'}': rank 1: No space left on device"] * 2


def test_a_rank_that_cannot_read_is_told_to_all(saved: Path, tmp_path: Path) -> None:
    """And what is in a file does not run."""
    path, ran = tmp_path / "x", tmp_path / "ran"
    shutil.copytree(saved, path)
    file = path / "parts_0/global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(pickle.dumps(_Evil(str(ran))) + b"\0" * file.stat().st_size)
    told = run_ranks(2, folders.is_refused, path, "", strategy=STAGES[2])
    words = rf"rank 1: '{re.escape(str(file))}' holds what is not safe to load, or is damaged: .*"
    for each in told:
        assert re.search(words, each)
    assert not ran.exists()


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_the_folder_that_was_meant_is_named(saved: Path) -> None:
    """One level too deep, or several, and one too high."""
    for inside in ("parts_0", "parts_0/global_step3", "parts_0/latest"):
        told = run_ranks(1, folders.is_refused, saved / inside, "", strategy=STAGES[2])[0]
        assert f"'{saved / inside}' is a part of a checkpoint; load the folder '{saved}'" in told
    told = run_ranks(1, folders.is_refused, saved.parent, "", strategy=STAGES[2])[0]
    assert "is a folder with checkpoints in it, not one itself; it holds " in told
    assert f"'{saved}'" in told


def test_a_part_that_is_missing_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "x")
    name = "parts_0/global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    (tmp_path / "x" / name).unlink()
    told = run_ranks(2, folders.is_refused, tmp_path / "x", "", strategy=STAGES[2])[1]
    assert f"is half a checkpoint: its file '{name}' of " in told


def test_the_command_shows_what_it_is(saved: Path) -> None:
    shown = CliRunner().invoke(checkpoint, ["inspect", str(saved)])
    assert shown.exit_code == 0, shown.output
    assert "on         2 processes, deepspeed, 32-true" in shown.output
    told = CliRunner().invoke(checkpoint, ["consolidate", str(saved)])
    assert (
        "holds a model in the layout 'deepspeed' of strategy 'deepspeed_stage_2', whose own "
        "processes alone read it; load it with strategy 'deepspeed_stage_2' on 2 devices and save "
        "it to a path with a suffix, such as 'x.ckpt', which every strategy reads on any number of "
        "devices"
    ) in " ".join(str(told.exception).split())


# -- DeepSpeed by itself ---------------------------------------------------------------------------


def _config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        # By default it clips at 1, where nobody asked for it.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_script_of_deepspeed_s_goes_on_here(tmp_path: Path, stage: int) -> None:
    path, strategy = tmp_path / "run" / "x", f"deepspeed_stage_{stage}"
    right = run_ranks(2, folders.by_deepspeed, path, _config(stage), strategy=strategy)[0]
    rest, losses = run_ranks(2, folders.goes_on_from_deepspeed, path, strategy=strategy)[0]
    assert rest == {"epoch": 2}
    assert losses == right
    # One step of several, which is asked for by its folder.
    one = path / "global_step1"
    rest, losses = run_ranks(2, folders.goes_on_from_deepspeed, one, strategy=strategy)[0]
    assert rest["epoch"] == 1
    assert losses[1:] == right[:2]
    if stage != 2:
        return
    inside = f"is a folder with DeepSpeed's checkpoints in it, not one itself; it holds '{path}'"
    other = f"the number of processes is 2 there and 1 here; {WAY_OUT}"
    for asked, ranks, words in ((path.parent, 2, inside), (path, 1, other)):
        with pytest.raises(RankFailed, match=re.escape(words)):
            run_ranks(ranks, folders.goes_on_from_deepspeed, asked, strategy=strategy)
    (path / "global_step2").rename(tmp_path / "gone")
    words = "is half a checkpoint of DeepSpeed: its file 'latest' names the folder 'global_step2'"
    with pytest.raises(RankFailed, match=words):
        run_ranks(2, folders.goes_on_from_deepspeed, path, strategy=strategy)
