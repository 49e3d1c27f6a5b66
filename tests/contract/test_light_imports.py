"""What may be imported, in fresh interpreters: this one has torch already."""

from __future__ import annotations

import os

import importlib_metadata
import pytest

from torchweft.testing.interpreter import fresh_interpreter

#: Of what decides what to run, everything; the rest of the core may use torch.
TORCH_FREE = [
    "torchweft",
    "torchweft.errors",
    "torchweft.specs",
    "torchweft.options",
    "torchweft.handoff",
    "torchweft.rank",
    "torchweft.known",
    "torchweft.hookspecs",
    "torchweft.faults",
    "torchweft.discovery",
    "torchweft.manager",
    "torchweft.catalog",
    "torchweft.request",
    "torchweft.plan",
    "torchweft.topology",
    "torchweft.detection",
    "torchweft.misfits",
    "torchweft.missing",
    "torchweft.resolve",
    "torchweft.builtin.launchers.detect_slurm",
    "torchweft.process",
    "torchweft.launching",
    "torchweft.cli",
    "torchweft.testing",
    "torchweft.testing.interpreter",
    "torchweft.testing.trial",
]

HOOKS = sorted(
    {entry_point.value for entry_point in importlib_metadata.entry_points(group="torchweft")}
)


def modules_after(code: str) -> frozenset[str]:
    """What is in ``sys.modules`` of a fresh interpreter that ran ``code``."""
    environ = {name: None for name in os.environ if name.startswith("TORCHWEFT_")}
    done = fresh_interpreter(code, environ={**environ, "PYTHONWARNINGS": None}, timeout=100)
    assert done.status == 0, done.err
    return done.loaded


def test_the_installed_plugins_are_known() -> None:
    assert "torchweft.builtin.hooks" in HOOKS
    assert {f"torchweft_{name}.hooks" for name in ("cuda", "deepspeed", "ray")} <= set(HOOKS)


def test_a_fresh_interpreter_can_import_torch() -> None:
    """So that its absence below says something."""
    assert "torch" in modules_after("import torch")


@pytest.mark.parametrize("module", [*TORCH_FREE, *HOOKS])
def test_declaring_and_deciding_import_no_torch(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert module in loaded
    assert loaded.isdisjoint({"torch", "numpy"})


def test_asking_every_probe_and_making_a_plan_imports_no_torch() -> None:
    loaded = modules_after(
        "import os\n"
        "from torchweft.catalog import Catalog\n"
        "from torchweft.manager import Manager\n"
        "from torchweft.request import RunRequest\n"
        "from torchweft.resolve import resolve\n"
        "manager = Manager.from_entry_points(os.environ)\n"
        "catalog = Catalog(manager.declared)\n"
        "assert catalog.rows() and not catalog.broken\n"
        "request = RunRequest.parse(accelerator='cpu', strategy='ddp', devices=2)\n"
        "plan = resolve(request.with_environment(os.environ, catalog), catalog,\n"
        "               environ=os.environ, objections=manager.objections)\n"
        "assert plan.topology.world_size == 2\n"
    )
    assert {"torchweft_cuda.hooks", "torchweft_deepspeed.probe"} <= loaded
    assert loaded.isdisjoint({"torch", "numpy", "deepspeed"})


def test_listing_the_plugins_imports_no_torch() -> None:
    loaded = modules_after("from torchweft.cli import main\nmain(['plugins'])")
    assert "torchweft.cli.plugins" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "deepspeed"})


def test_fabric_brings_nothing_that_is_needed_later_alone() -> None:
    loaded = modules_after("from torchweft import Fabric")
    assert {"torch", "torchweft.fabric"} <= loaded
    assert loaded.isdisjoint(
        {"click", "rich", "torch._dynamo", "torch.distributed.checkpoint", "importlib_metadata"}
    )


def test_torchweft_itself_brings_little() -> None:
    loaded = modules_after("import torchweft")
    assert loaded.isdisjoint({"click", "rich", "importlib_metadata", "torchweft.resolve"})
