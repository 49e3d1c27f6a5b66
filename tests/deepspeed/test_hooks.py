"""What torchweft-deepspeed declares, and what a plan says to it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from torchweft import Fabric
from torchweft.errors import IncompatiblePlan
from torchweft.specs import is_target, load_target
from torchweft.testing import PluginConformance, PrecisionConformance
from torchweft.testing.declared import find
from torchweft_deepspeed import hooks


class TestPlugin(PluginConformance):
    plugin = "deepspeed"


def test_it_is_installed_under_its_name() -> None:
    (entry,) = entry_points(group="torchweft", name="deepspeed")
    assert entry.load() is hooks


def test_everything_declared_can_be_loaded() -> None:
    specs = [*hooks.torchweft_strategies(), *hooks.torchweft_precisions()]
    assert [spec.name for spec in specs] == [
        "deepspeed",
        "32-true",
        "bf16-true",
        "16-true",
        "bf16-mixed",
        "16-mixed",
    ]
    for spec in specs:
        for target in spec.targets().values():
            assert is_target(target)
            assert callable(load_target(target, "torchweft-deepspeed"))


@pytest.mark.parametrize(
    ("alias", "options"),
    [
        ("deepspeed_stage_1", {"stage": 1}),
        ("deepspeed_stage_1_offload", {"stage": 1, "offload_optimizer": "cpu"}),
        ("deepspeed_stage_2", {"stage": 2}),
        ("deepspeed_stage_2_offload", {"stage": 2, "offload_optimizer": "cpu"}),
        ("deepspeed_stage_3", {"stage": 3}),
        (
            "deepspeed_stage_3_offload",
            {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
        ),
    ],
)
def test_presets(alias: str, options: dict[str, Any]) -> None:
    plan = Fabric(accelerator="cpu", devices=2, strategy=alias).plan
    assert plan.strategy.name == "deepspeed"
    assert plan.options["strategy"] == options


def test_precisions_are_its_own() -> None:
    for name in ("32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"):
        plan = Fabric(accelerator="cpu", devices=2, strategy="deepspeed", precision=name).plan
        assert plan.precision.target.startswith("torchweft_deepspeed.")
    plan = Fabric(accelerator="cpu", devices=2, strategy="deepspeed").plan
    assert plan.precision.target == "torchweft_deepspeed.precision:Full"
    with pytest.raises(IncompatiblePlan, match="takes only a precision made for it"):
        Fabric(accelerator="cpu", devices=2, strategy="deepspeed", precision="64-true")


def test_a_preset_that_needs_a_folder_says_so() -> None:
    words = (
        "strategy 'deepspeed' was asked for offload_optimizer='nvme', and no folder of the drive "
        "was named; write nvme_path='/the/folder' with it"
    )
    with pytest.raises(IncompatiblePlan, match=words):
        Fabric(accelerator="cpu", devices=2, strategy="deepspeed_stage_3_offload_nvme")


def test_a_plan_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; from torchweft_deepspeed import hooks, probe, requests; "
        "probe.deepspeed(); requests.objections({'stage': 3}); "
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_strategy_does_not_import_deepspeed() -> None:
    code = (
        "import sys; import torchweft_deepspeed.strategy; "
        "torchweft_deepspeed.strategy.DeepSpeedStrategy(stage=3); "
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("strategy", "package"),
    [
        ("auto", "torchweft.builtin"),
        ("ddp", "torchweft.builtin"),
        ("deepspeed", "torchweft_deepspeed"),
        ("deepspeed_stage_3", "torchweft_deepspeed"),
        ("deepspeed:stage=0", "torchweft_deepspeed"),
    ],
)
def test_the_kit_means_the_precision_of_its_strategy(strategy: str, package: str) -> None:
    cls = type("TestIt", (PrecisionConformance,), {"precision": "16-true", "strategy": strategy})
    assert find(cls, "precision", "cpu").spec.target.startswith(package)


@pytest.mark.parametrize(("device", "asks"), [("nvidia0", False), ("kfd", False), ("null", True)])
def test_what_looks_for_a_gpu_is_preloaded_where_there_is_none(
    device: str, asks: bool, tmp_path: Path
) -> None:
    (tmp_path / device).touch()
    found = hooks._preload(tmp_path)
    assert ("torch._inductor.compile_fx" in found) is asks
    assert ("torch.utils.cpp_extension" in found) is asks
    assert {"torch._dynamo", "pydantic"} <= set(found)
