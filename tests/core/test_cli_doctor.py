"""``torchweft doctor``: every check on made-up facts, and the command on this computer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torchweft
from torchweft.catalog import Catalog
from torchweft.cli import doctor as module
from torchweft.cli import main
from torchweft.cli.doctor import CHECKS, Computer, Device, Facts, Finding, Torch
from torchweft.manager import Declared
from torchweft.specs import AcceleratorSpec, Availability, StrategySpec

HEALTHY = Facts(
    environ={},
    catalog=Catalog([]),
    torch=Torch(version="2.13.0"),
    computer=Computer(cores=4, cores_usable=4, memory=8 << 30, host="here"),
)


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


# -- checks ------------------------------------------------------------------------------------


def test_torch_that_cannot_be_imported() -> None:
    found = the_finding(replace(HEALTHY, torch=Torch(error="OSError: libx.so: not found")))
    assert found.broken
    assert found.message == "torch cannot be imported: OSError: libx.so: not found"


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
    facts = replace(HEALTHY, torch=Torch(version="2.13.0+cpu"), drivers=("NVIDIA",))
    found = the_finding(facts)
    assert not found.broken
    assert found.message == (
        "there is a driver of NVIDIA here, but torch 2.13.0+cpu was built without cuda, "
        "so that none of its devices can be used"
    )


def test_a_driver_without_a_plugin_for_it() -> None:
    facts = replace(
        HEALTHY, torch=Torch(version="2.13.0", built_for={"cuda": "13.0"}), drivers=("NVIDIA",)
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


# -- gathering ---------------------------------------------------------------------------------


def control_group(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_control_groups_2_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    root = control_group(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/box/memory.max": "1073741824\n",
            "sys/fs/cgroup/pod/memory.max": "2147483648\n",
        },
    )
    assert module._limits(root) == (1.5, 1 << 30)


def test_limits_of_control_groups_1(tmp_path: Path) -> None:
    root = control_group(
        tmp_path,
        {
            # The path is the one outside the container, which does not exist inside.
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n1:name=x:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
        },
    )
    assert module._limits(root) == (2.0, 512 << 20)


def test_no_limits(tmp_path: Path) -> None:
    root = control_group(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu:/\n3:memory:/\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert module._limits(root) == (None, None)
    assert module._limits(tmp_path / "elsewhere") == (None, None)


def test_a_name_that_resolves_one_that_does_not_and_one_that_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(host: str, port: None) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    answer = threading.Event()
    monkeypatch.setattr(module, "_LOOK_UP", 0.01)
    assert module._host_error("here", lambda host, port: answer.wait()) == "no answer in 0.01 s"
    answer.set()
    monkeypatch.setattr(module, "_LOOK_UP", 60.0)
    assert module._host_error("here", lambda host, port: []) == ""
    assert module._host_error("here", unknown) == "[Errno -2] Name or service not known"


def counted(monkeypatch: pytest.MonkeyPatch, name: Callable[[int], str]) -> Device:
    """An accelerator whose probe promises two devices, which torch names by ``name``."""
    plugin, library = ModuleType("loom_plugin"), ModuleType("torch.loom")
    plugin.probe = lambda: Availability(ok=True, count=2)  # type: ignore[attr-defined]
    library.get_device_name = name  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loom_plugin", plugin)
    monkeypatch.setitem(sys.modules, "torch.loom", library)
    spec = AcceleratorSpec(name="loom", target="a:B", device="loom", probe="loom_plugin:probe")
    catalog = Catalog([declared("acme", specs=(spec,))])
    (device,) = module._devices(catalog, Torch(version="2.13.0"))
    return device


def test_devices_are_called_what_torch_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device = counted(monkeypatch, lambda index: f"Jacquard {index}")
    assert (device.count, device.names) == (2, ("Jacquard 0", "Jacquard 1"))
    assert module._describe(device) == "available, 2 device(s): Jacquard 0, Jacquard 1"


def test_an_error_of_torch_about_a_device_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(index: int) -> str:
        raise RuntimeError("the driver is too old")

    device = counted(monkeypatch, fails)
    assert (device.names, device.error) == ((), "RuntimeError: the driver is too old")


# -- the command -------------------------------------------------------------------------------

TORN = """
from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec, Availability, StrategySpec

@hookimpl
def torchweft_accelerators():
    return [AcceleratorSpec(name="loom", target="a:B", device="loom", probe="torn:probe")]

@hookimpl
def torchweft_strategies():
    return [StrategySpec(name="weave", target="torn:Nowhere")]

def probe():
    return 1 / 0
"""


def install(folder: Path, name: str, code: str) -> None:
    (folder / f"{name}.py").write_text(code)
    info = folder / f"torchweft_{name}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchweft-{name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[torchweft]\n{name} = {name}\n")


def doctor(*args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    unwanted = ("TORCHWEFT_", "NCCL_", "GLOO_", "PYTHONDONTWRITEBYTECODE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    return subprocess.run(
        [sys.executable, "-m", "torchweft", "doctor", *args],
        env={**kept, **extra},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_on_this_computer() -> None:
    done = doctor("--json", GLOO_SOCKET_IFNAME="lo", A_SECRET="hidden")
    assert done.returncode == 0, done.stdout
    document = json.loads(done.stdout)
    assert set(document) == {
        "versions",
        "torch_built_for",
        "devices",
        "computer",
        "collectives",
        "environment",
        "plan",
        "findings",
    }
    assert document["versions"]["torch"] == str(torch.__version__)
    assert document["versions"]["torchweft"] == torchweft.__version__
    assert document["collectives"]["gloo"] is torch.distributed.is_gloo_available()
    assert document["collectives"]["nccl"] is torch.distributed.is_nccl_available()
    assert document["torch_built_for"].get("cuda") == torch.version.cuda
    (cpu,) = (device for device in document["devices"] if device["accelerator"] == "cpu")
    assert cpu["available"]
    assert document["environment"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert "A_SECRET" not in document["environment"]
    assert document["computer"]["cores_usable"] <= document["computer"]["cores"]
    assert document["computer"]["memory"] > 1 << 20
    assert " x " in document["plan"]
    assert not any(finding["broken"] for finding in document["findings"])


def test_the_text_has_every_section_and_what_to_do() -> None:
    done = doctor(PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stdout
    for heading in (
        "Versions",
        "Devices",
        "Computer",
        "Collectives",
        "Environment",
        "Plan",
        "Findings",
    ):
        assert f"{heading}\n" in done.stdout
    assert "  warning  Python does not keep what it compiles here" in done.stdout
    assert f"{'':11}what to do: unset PYTHONDONTWRITEBYTECODE" in done.stdout


def test_broken_things_end_with_status_1(tmp_path: Path) -> None:
    install(tmp_path, "torn", TORN)
    install(tmp_path, "gone", "import gone_library")
    left = '{"run_id": "r", "pid": -1, "parent": -1}'
    done = doctor("--json", PYTHONPATH=str(tmp_path), TORCHWEFT_RUN=left)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["versions"]["torchweft-torn"] == "0.1"
    plugin, probe, target = (f["message"] for f in document["findings"] if f["broken"])
    assert plugin == (
        "plugin 'gone' (torchweft-gone 0.1) failed to load: "
        "ModuleNotFoundError: No module named 'gone_library'"
    )
    assert probe == (
        "accelerator 'loom': the probe 'torn:probe' of torchweft-torn 0.1 failed: "
        "ZeroDivisionError: division by zero"
    )
    assert target == (
        "strategy 'weave': torchweft-torn 0.1 declares the target 'torn:Nowhere', which cannot be "
        "loaded: AttributeError: module 'torn' has no attribute 'Nowhere'"
    )
    warnings = [finding["message"] for finding in document["findings"] if not finding["broken"]]
    assert any(message.startswith("TORCHWEFT_RUN is set, but was left") for message in warnings)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TORCHWEFT_TRACE", "yes", "TORCHWEFT_TRACE is 'yes'; it takes 1 or 0"),
        ("TORCHWEFT_DISABLE_PLUGINS", "nobody", "TORCHWEFT_DISABLE_PLUGINS names 'nobody'"),
        ("TORCHWEFT_LAUNCHER", "spwan", "no launcher is called 'spwan'"),
        ("TORCHWEFT_RUN", "{", "TORCHWEFT_RUN is '{', which 'torchweft run' never writes"),
    ],
)
def test_a_variable_that_cannot_be_used_is_a_finding(
    variable: str,
    value: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == 1
    (broken,) = (f for f in json.loads(capsys.readouterr().out)["findings"] if f["broken"])
    assert broken["message"].startswith("Fabric() without arguments fails here: ")
    assert words in broken["message"]
    assert broken["hint"] == f"unset {variable}, unless it is meant"
