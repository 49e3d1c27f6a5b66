"""``torchweft doctor``: the rows of its text, and the command on this computer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import torchweft
from torchweft.catalog import Catalog
from torchweft.cli import doctor as module
from torchweft.cli import main
from torchweft.cli.facts import Computer, Device, Facts, Torch

LOOMS = Device(accelerator="loom", provider="torchweft-acme 1.0", available=True)


@pytest.mark.parametrize(
    ("device", "text"),
    [
        (LOOMS, "available"),
        (replace(LOOMS, count=1), "available, 1 device"),
        (
            replace(LOOMS, count=2, names=("Jacquard 0", "Jacquard 1")),
            "available, 2 devices: Jacquard 0, Jacquard 1",
        ),
        (
            replace(LOOMS, count=2, error="RuntimeError: the driver is too old"),
            "available, 2 devices; torch cannot use them, see below",
        ),
        (
            replace(LOOMS, available=False, reason="no driver", hint="install it"),
            "not available: no driver; install it",
        ),
        (replace(LOOMS, available=False, reason="no driver"), "not available: no driver"),
    ],
)
def test_a_device_in_one_row(device: Device, text: str) -> None:
    assert module._describe(device) == text


def rows_of(facts: Facts, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The text without its alignment."""
    module._write(facts, [])
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


FACTS = Facts(
    environ={},
    catalog=Catalog([]),
    torch=Torch(version="2.13.0"),
    computer=Computer(cores=4, cores_usable=2, memory=8 << 30, host="here"),
)


def test_the_text_where_torch_cannot_be_imported(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(replace(FACTS, torch=Torch(error="OSError: libx.so: not found")), capsys)
    assert "torch cannot be imported, see below" in rows
    assert rows[rows.index("Collectives") + 1] == "torch cannot be imported, see below"
    assert not any(row.startswith("built for") for row in rows)


def test_the_text_where_nothing_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(replace(FACTS, plan_error="no accelerator can be used here"), capsys)
    assert rows[rows.index("torch 2.13.0") + 1] == "built for the processor alone"
    assert rows[rows.index("Devices") + 1] == "no plugin provides an accelerator"
    assert rows[rows.index("Collectives") + 1] == "torch.distributed is not in this torch"
    assert rows[rows.index("Plan") + 1] == "Fabric() fails, see below"


def test_the_text_of_what_torch_was_built_for_and_of_limits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch = Torch(version="2.13.0", built_for={"cuda": "13.0", "hip": "7"})
    computer = replace(FACTS.computer, cpu_limit=1.5, memory_limit=1 << 30, shared_memory=1 << 26)
    rows = rows_of(replace(FACTS, torch=torch, computer=computer), capsys)
    assert rows[rows.index("torch 2.13.0") + 1] == "built for cuda 13.0, hip 7"
    assert "cores 2 of 4 usable, limited to the time of 1.5" in rows
    assert "memory 8.0 GiB, limited to 1.0 GiB" in rows
    assert "shared memory 0.1 GiB" in rows


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
