"""Every check of ``torchweft doctor`` on made-up facts."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

import torchweft
from torchweft.catalog import Catalog
from torchweft.cli import checks as module
from torchweft.cli.checks import CHECKS, Finding
from torchweft.cli.facts import Computer, Device, Driver, Facts, Torch, Unusable
from torchweft.manager import Declared
from torchweft.specs import AcceleratorSpec, StrategySpec

HEALTHY = Facts(
    environ={},
    catalog=Catalog([]),
    torch=Torch(version="2.13.0"),
    computer=Computer(cores=4, cores_usable=4, memory=8 << 30, host="here"),
)

NVIDIA = Driver(maker="NVIDIA", sign="/proc/nvidia", build="cuda", accelerator="cuda")


def declared(name: str, version: str = "1.0", **fields: object) -> Declared:
    return Declared(plugin=name, distribution=f"torchweft-{name}", version=version, **fields)


def findings(facts: Facts) -> list[Finding]:
    return [finding for check in CHECKS for finding in check(facts)]


def the_finding(facts: Facts) -> Finding:
    (finding,) = findings(facts)
    assert finding.hint
    return finding


def test_nothing_is_wrong_where_nothing_is() -> None:
    assert findings(HEALTHY) == []


def test_torch_that_cannot_be_imported() -> None:
    found = the_finding(replace(HEALTHY, torch=Torch(error="OSError: libx.so: not found")))
    assert found.broken
    assert found.message == "torch cannot be imported: OSError: libx.so: not found"


def test_what_is_installed_and_cannot_be_used() -> None:
    loom = Unusable(
        kind="strategy", name="loom", provider="torchweft-loom 1", reason="no yarn", hint="buy some"
    )
    assert the_finding(replace(HEALTHY, unusable=(loom,))) == Finding(
        broken=False,
        message="strategy 'loom' (torchweft-loom 1) cannot be used here: no yarn",
        hint="buy some",
    )
    found = the_finding(replace(HEALTHY, unusable=(replace(loom, hint=""),)))
    assert found.hint == "see the documentation of torchweft-loom 1"


@pytest.mark.parametrize("version", ["1.13.1", "2.8.0+cu126"])
def test_torch_that_is_too_old(version: str) -> None:
    found = the_finding(replace(HEALTHY, torch=Torch(version=version)))
    assert found == Finding(
        broken=True,
        message=f"torch {version} is older than torchweft supports",
        hint="pip install 'torch>=2.9'",
    )


@pytest.mark.parametrize("version", ["2.9.0", "2.14.0a0+git1234", "3.0.0"])
def test_torch_that_is_new_enough(version: str) -> None:
    assert findings(replace(HEALTHY, torch=Torch(version=version))) == []


def test_a_plugin_that_failed_to_load() -> None:
    catalog = Catalog([declared("acme", error="ModuleNotFoundError: No module named 'loom'")])
    found = the_finding(replace(HEALTHY, catalog=catalog))
    assert found.broken
    assert found.message == (
        "plugin 'acme' (torchweft-acme 1.0) failed to load: "
        "ModuleNotFoundError: No module named 'loom'"
    )
    assert found.hint.startswith(
        "upgrade or uninstall torchweft-acme, or set TORCHWEFT_DISABLE_PLUGINS=acme"
    )


def test_a_clash_is_one_finding_for_each_name() -> None:
    catalog = Catalog(
        [
            declared(name, specs=(StrategySpec(name="weave", target="a:B", aliases=("knit",)),))
            for name in ("acme", "rival")
        ]
    )
    knit, weave = findings(replace(HEALTHY, catalog=catalog))
    assert (knit.broken, weave.broken) == (True, True)
    assert knit.message.startswith("strategy 'knit' is declared by both ")
    assert weave.message == (
        "strategy 'weave' is declared by both torchweft-acme 1.0 and torchweft-rival 1.0, "
        "for the same devices and strategies"
    )
    assert weave.hint == (
        "uninstall one of them, or leave one out with TORCHWEFT_DISABLE_PLUGINS=acme or "
        "TORCHWEFT_DISABLE_PLUGINS=rival"
    )


def test_a_plugin_of_the_family_from_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "__version__", "0.4.2")
    catalog = Catalog(
        [
            Declared(plugin="builtin", distribution="torchweft", version="0.4.2"),
            declared("cuda", "0.3.9"),
            declared("xla", "0.4.0"),
            # Somebody else's plugin has versions of its own.
            declared("acme", "7.0"),
        ]
    )
    assert the_finding(replace(HEALTHY, catalog=catalog)) == Finding(
        broken=True,
        message="torchweft-cuda 0.3.9 does not belong to the torchweft 0.4.2 that is imported",
        hint="pip install 'torchweft-cuda==0.4.*'",
    )


def test_devices_that_torch_cannot_use() -> None:
    device = Device(
        accelerator="loom",
        provider="torchweft-acme 1.0",
        available=True,
        count=2,
        error="RuntimeError: the driver is too old",
    )
    found = the_finding(replace(HEALTHY, devices=(device,)))
    assert found.broken
    assert found.message == (
        "accelerator 'loom' (torchweft-acme 1.0) should have 2 device(s), but torch 2.13.0 "
        "cannot use them: RuntimeError: the driver is too old"
    )


def test_a_build_of_torch_that_does_not_fit_the_driver() -> None:
    facts = replace(HEALTHY, torch=Torch(version="2.13.0+cpu"), drivers=(NVIDIA,))
    found = the_finding(facts)
    assert not found.broken
    assert found.message == (
        "there is a driver of NVIDIA here, but torch 2.13.0+cpu was built without cuda, "
        "so that none of its devices can be used"
    )


def test_a_driver_without_a_plugin_for_it() -> None:
    facts = replace(
        HEALTHY, torch=Torch(version="2.13.0", built_for={"cuda": "13.0"}), drivers=(NVIDIA,)
    )
    assert the_finding(facts) == Finding(
        broken=False,
        message="there is a driver of NVIDIA here, but no installed plugin provides "
        "accelerator 'cuda'",
        hint="pip install torchweft-cuda",
    )
    spec = AcceleratorSpec(name="cuda", target="a:B", device="cuda")
    version = torchweft.__version__
    catalog = Catalog([declared("cuda", version, specs=(spec,))])
    assert findings(replace(facts, catalog=catalog)) == []


def test_a_plan_that_fails_names_the_variables_that_may_be_guilty() -> None:
    facts = replace(HEALTHY, plan_error="no launcher is called 'x'")
    found = the_finding(replace(facts, environ={"TORCHWEFT_LAUNCHER": "x"}))
    assert found == Finding(
        broken=True,
        message="Fabric() without arguments fails here: no launcher is called 'x'",
        hint="unset TORCHWEFT_LAUNCHER, unless it is meant",
    )
    both = {"TORCHWEFT_LAUNCHER": "x", "TORCHWEFT_DISABLE_PLUGINS": "acme"}
    assert the_finding(replace(facts, environ=both)).hint == (
        "unset TORCHWEFT_DISABLE_PLUGINS or TORCHWEFT_LAUNCHER, unless it is meant"
    )
    assert "torchweft plugins" in the_finding(facts).hint


def test_a_hand_off_that_was_left_over() -> None:
    left = '{"run_id": "r", "pid": -1, "parent": -1}'
    found = the_finding(replace(HEALTHY, environ={"TORCHWEFT_RUN": left}))
    assert not found.broken
    assert found.hint == "unset TORCHWEFT_RUN"
    mine = json.dumps({"run_id": "r", "pid": os.getpid()})
    assert findings(replace(HEALTHY, environ={"TORCHWEFT_RUN": mine})) == []


def test_python_that_does_not_keep_bytecode() -> None:
    found = the_finding(replace(HEALTHY, writes_bytecode=False))
    assert not found.broken
    assert "unset PYTHONDONTWRITEBYTECODE" in found.hint


def test_a_container_with_less_time_than_cores() -> None:
    facts = replace(HEALTHY, computer=replace(HEALTHY.computer, cpu_limit=2.5))
    found = the_finding(facts)
    assert not found.broken
    assert "the time of 2.5 cores, but torch sees 4" in found.message
    assert found.hint.startswith("set OMP_NUM_THREADS=2,")
    assert findings(replace(facts, environ={"OMP_NUM_THREADS": "2"})) == []
    assert findings(replace(HEALTHY, computer=replace(HEALTHY.computer, cpu_limit=4.0))) == []


def test_little_shared_memory() -> None:
    facts = replace(HEALTHY, computer=replace(HEALTHY.computer, shared_memory=64 << 20))
    found = the_finding(facts)
    assert not found.broken
    assert found.message.startswith("/dev/shm has 64 MiB")


def test_a_host_name_that_does_not_resolve() -> None:
    facts = replace(HEALTHY, computer=replace(HEALTHY.computer, host_error="not known"))
    found = the_finding(facts)
    assert not found.broken
    assert found.message.startswith("this computer's name 'here' does not resolve (not known)")
