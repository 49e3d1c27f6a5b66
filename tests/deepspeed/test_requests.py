"""Options and a configuration: what goes where, and what cannot be asked."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from torchweft import Fabric
from torchweft.errors import IncompatiblePlan, InvalidRequest, UnknownOption
from torchweft_deepspeed.requests import merged, objections
from torchweft_deepspeed.strategy import DeepSpeedStrategy


def _refused(words: str, **options: Any) -> None:
    """The same words for a class that is called and for a plan."""
    with pytest.raises(InvalidRequest, match=re.escape(words)):
        DeepSpeedStrategy(**options)
    assert any(words in sentence for sentence in objections(options)), objections(options)


def test_options_have_their_places() -> None:
    config = merged(
        {
            "stage": 3,
            "offload_optimizer": "cpu",
            "reduce_bucket_size": 1000,
            "stage3_param_persistence_threshold": 0,
            "partition_activations": True,
            "zero_force_ds_cpu_optimizer": False,
            "config": {"zero_optimization": {"sub_group_size": 10}, "wall_clock_breakdown": True},
        }
    )
    assert config == {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "reduce_bucket_size": 1000,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 10,
        },
        "activation_checkpointing": {"partition_activations": True},
        "wall_clock_breakdown": True,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def test_what_is_left_out_is_left_to_deepspeed() -> None:
    assert merged({}) == {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}


def test_a_configuration_may_say_the_stage() -> None:
    assert merged({"config": {"zero_optimization": {"stage": 3}}})["zero_optimization"] == {
        "stage": 3
    }


def test_auto_is_what_follows_from_the_script() -> None:
    config = {"train_batch_size": "auto", "zero_optimization": {"reduce_bucket_size": "auto"}}
    assert merged({"config": config}) == merged({})


def test_the_drive_is_named_once_for_both() -> None:
    options = {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"}
    zero = merged({**options, "nvme_path": "/tmp"})["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "/tmp"}
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "/tmp"}


def test_both_say_something() -> None:
    _refused(
        "strategy 'deepspeed' was given stage=2 and config= with 'zero_optimization.stage': 3; "
        "leave one of them out",
        stage=2,
        config={"zero_optimization": {"stage": 3}},
    )


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("train_batch_size", 8, "the loader that fabric.setup_dataloaders() is given"),
        ("gradient_accumulation_steps", 4, "fabric.accumulate(model, steps=…)"),
        ("gradient_clipping", 1.0, "fabric.clip_gradients(model, optimizer, max_norm=…)"),
        ("fp16", {"enabled": True}, "precision='16-mixed' or '16-true'"),
        ("bf16", {"enabled": True}, "precision='bf16-mixed' or 'bf16-true'"),
        ("optimizer", {"type": "Adam"}, "the optimizer that fabric.setup(model, optimizer)"),
        ("scheduler", {"type": "WarmupLR"}, "fabric.setup(model, optimizer, scheduler=…)"),
        ("checkpoint", {"load_universal": True}, "fabric.save(path, …) and fabric.load(path, …)"),
    ],
)
def test_what_follows_from_the_script(key: str, value: Any, instead: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        merged({"config": {key: value}})
    assert f"config= with '{key}': {value!r}, and that follows from" in str(refused.value)
    assert instead in str(refused.value)
    assert str(refused.value).endswith(f"leave '{key}' out of the configuration")


@pytest.mark.parametrize("stage", [4, -1])
def test_a_stage_that_there_is_not(stage: int) -> None:
    _refused(
        f"strategy 'deepspeed' has the stages 0, 1, 2 and 3, and stage={stage} was asked",
        stage=stage,
    )
    with pytest.raises(InvalidRequest, match=r"takes stage as 0 \| 1 \| 2 \| 3 \| None, not 4"):
        Fabric(accelerator="cpu", strategy="deepspeed:stage=4")


def test_parameters_are_offloaded_at_stage_3() -> None:
    _refused(
        "strategy 'deepspeed' was asked for offload_parameters='cpu' at stage 2, where every "
        "process needs all parameters; write stage=3 with it",
        stage=2,
        offload_parameters="cpu",
    )


def test_nothing_is_offloaded_at_stage_0() -> None:
    _refused("write stage=1, 2 or 3 with it", stage=0, offload_optimizer="cpu")


def test_a_drive_is_for_stage_3() -> None:
    _refused("or offload_optimizer='cpu'", stage=2, offload_optimizer="nvme", nvme_path="/tmp")


def test_a_drive_without_a_folder() -> None:
    _refused("write nvme_path='/the/folder' with it", stage=3, offload_optimizer="nvme")


def test_a_folder_for_nothing() -> None:
    _refused(
        "strategy 'deepspeed' was given nvme_path='/tmp', and nothing is offloaded there",
        nvme_path="/tmp",
    )


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "below")
    _refused(
        f"strategy 'deepspeed' was given nvme_path='{path}', and '{tmp_path / 'file'}' is not a "
        "folder; name a folder that this user may write",
        stage=3,
        offload_parameters="nvme",
        nvme_path=path,
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    _refused("cannot be written", stage=3, offload_optimizer="nvme", nvme_path=str(tmp_path))


def test_a_drive_without_the_library_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchweft_deepspeed.requests._AIO", "no-such-header.h")
    with pytest.raises(IncompatiblePlan) as refused:
        Fabric(accelerator="cpu", devices=2, strategy="deepspeed_stage_3_offload_nvme")
    for option in ("offload_optimizer", "offload_parameters"):
        assert (
            f"strategy 'deepspeed' was asked for {option}='nvme', for which DeepSpeed compiles an "
            "extension with libaio, whose header no-such-header.h is not here; install it (apt "
            "install libaio-dev), or write 'cpu' in place of 'nvme'"
        ) in str(refused.value)
        assert f"{option}='nvme', and no folder of the drive was named" in str(refused.value)


@pytest.mark.parametrize("option", ["partition_activations", "contiguous_memory_optimization"])
def test_activations_are_not_divided(option: str) -> None:
    words = (
        f"strategy 'deepspeed' was asked for {option}, by which DeepSpeed divides activations "
        "between the processes that have one model together; here every process has a model, so "
        "that it would save nothing: leave it out"
    )
    _refused(words, **{option: True})
    _refused(words, config={"activation_checkpointing": {option: True}})


def test_activations_are_not_moved_to_where_they_are() -> None:
    DeepSpeedStrategy(cpu_checkpointing=True)
    words = (
        "strategy 'deepspeed' was asked for cpu_checkpointing, which moves activations to the "
        "memory of the host, and on accelerator 'cpu' they are there; leave it out"
    )
    with pytest.raises(IncompatiblePlan, match=words):
        Fabric(accelerator="cpu", devices=2, strategy="deepspeed:cpu_checkpointing=true")
    assert objections({"cpu_checkpointing": True}, "cuda") == []


def test_what_deepspeed_does_not_know_of_activations() -> None:
    _refused(
        "strategy 'deepspeed' was given config= with "
        "'activation_checkpointing.partition_activation', which DeepSpeed does not know; did you "
        "mean 'partition_activations'? it knows contiguous_memory_optimization, cpu_checkpointing, "
        "number_checkpoints, partition_activations, profile, synchronize_checkpoint_boundary",
        config={"activation_checkpointing": {"partition_activation": False}},
    )
    block = {"profile": True, "number_checkpoints": 3, "partition_activations": False}
    assert objections({"config": {"activation_checkpointing": block}}, "cpu") == []


def test_an_option_that_there_is_not() -> None:
    with pytest.raises(UnknownOption, match=r"has no option 'stge'; did you mean 'stage'\?"):
        Fabric(accelerator="cpu", strategy="deepspeed:stge=3")


# -- files -----------------------------------------------------------------------------------------


def _planned(path: Path, words: str) -> None:
    with pytest.raises(IncompatiblePlan, match=re.escape(words)):
        Fabric(accelerator="cpu", devices=2, strategy=f"deepspeed:config={path}")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert merged({"config": str(path)})["zero_optimization"] == {"stage": 1}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    _planned(path, f"'{path}' cannot be read: No such file or directory")


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("{stage: 3")
    _planned(path, f"'{path}' is not JSON: Expecting property name")


def test_a_file_that_holds_no_object(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("[1]")
    _planned(path, f"'{path}' holds a list where an object belongs")


def test_a_file_is_not_read_by_the_constructor() -> None:
    DeepSpeedStrategy(config="/no/such/file.json")


def test_a_configuration_of_another_kind() -> None:
    _refused("config=3; it takes a dict or the path of a JSON file", config=3)
    _refused(
        "config= with 'zero_optimization': True; an object belongs there",
        config={"zero_optimization": True},
    )
