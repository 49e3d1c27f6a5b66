"""What torchweft-cuda declares."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from torchweft import Fabric, hookspecs
from torchweft.specs import is_target, load_target
from torchweft_cuda import hooks


def test_it_is_installed_under_its_name() -> None:
    (entry,) = entry_points(group="torchweft", name="cuda")
    assert entry.value == "torchweft_cuda.hooks"
    assert entry.load() is hooks


def test_everything_declared_can_be_loaded() -> None:
    specs = [
        *hooks.torchweft_accelerators(),
        *hooks.torchweft_strategies(),
        *hooks.torchweft_precisions(),
    ]
    assert [spec.name for spec in specs] == [
        "cuda",
        "ddp",
        "fsdp",
        "bf16-mixed",
        "16-mixed",
        "16-mixed",
    ]
    for spec in specs:
        for target in spec.targets().values():
            assert is_target(target)
            assert callable(load_target(target, "torchweft-cuda"))
        assert spec.summary


def test_names() -> None:
    (cuda,) = hooks.torchweft_accelerators()
    assert cuda.names() == ("cuda", "gpu")
    assert (cuda.device, cuda.default_devices) == ("cuda", "all")
    ddp, fsdp = hooks.torchweft_strategies()
    assert ddp.names() == (
        "ddp",
        "ddp_spawn",
        "ddp_fork",
        "ddp_notebook",
        "ddp_find_unused_parameters_true",
    )
    assert ddp.devices == ("cuda", "cpu")
    assert fsdp.names() == ("fsdp", "fsdp_cpu_offload")
    assert fsdp.devices == ("cuda", "cpu")
    *sharded, half = hooks.torchweft_precisions()
    assert half.names() == ("16-mixed", "16")
    assert [spec.names() for spec in sharded] == [("bf16-mixed", "bf16"), ("16-mixed", "16")]
    assert {spec.strategies for spec in sharded} == {("fsdp",)}


@pytest.mark.parametrize(
    ("strategy", "precision", "target"),
    [
        ("fsdp", "bf16-mixed", "torchweft_cuda.sharded_precision:ShardedBFloat16Mixed"),
        ("fsdp", "bf16", "torchweft_cuda.sharded_precision:ShardedBFloat16Mixed"),
        ("fsdp", "16", "torchweft_cuda.sharded_precision:ShardedHalfMixed"),
        ("fsdp", "16-true", "torchweft.builtin.precisions:Half"),
        ("ddp", "bf16", "torchweft.builtin.precisions:BFloat16Mixed"),
        ("ddp", "16", "torchweft_cuda.half_mixed:HalfMixed"),
    ],
)
def test_sharded_parameters_have_precisions_of_their_own(strategy, precision, target) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision)
    assert fabric.plan.precision.target == target


def test_every_hook_has_the_signature_of_its_page() -> None:
    for name, hook in inspect.getmembers(hooks, inspect.isfunction):
        if name.startswith("torchweft_"):
            page = inspect.signature(getattr(hookspecs, name))
            assert list(inspect.signature(hook).parameters) == list(page.parameters)


def test_declaring_imports_no_torch() -> None:
    code = (
        "import sys; import torchweft_cuda.hooks as hooks\n"
        "hooks.torchweft_accelerators(); hooks.torchweft_strategies()\n"
        "hooks.torchweft_precisions()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
