"""``torchweft plan`` as a process: decisions, refusals, and torch only where options need it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from torchweft import __version__

LOOMS = """
from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec, Availability, LauncherSpec, Preset, StrategySpec

@hookimpl
def torchweft_accelerators():
    return [AcceleratorSpec(name="loom", target="looms_impl:Loom", device="loom",
                            priority=900, probe="looms:probe")]

@hookimpl
def torchweft_strategies():
    return [StrategySpec(name="weave", target="looms_impl:Weave", devices=("loom",), priority=1,
                         presets=(Preset(alias="weave_tight", options={"tight": True}),
                                  Preset(alias="weave_spawn", launcher="spawn")))]

@hookimpl
def torchweft_launchers():
    return [LauncherSpec(name="mill", target="looms_impl:Mill", priority=500, nodes="any",
                         processes="many", strategies=("weave",))]

@hookimpl
def torchweft_check_plan(plan):
    if plan.topology.devices == (0, 1, 2):
        return ["three looms tangle; take two or four"]
    return []

def probe():
    return Availability(ok=True, count=4)
"""

IMPLEMENTATION = """
import torch

class Loom:
    pass

class Mill:
    pass

class Weave:
    def __init__(self, tight: bool = False, threads: int = 8) -> None:
        pass
"""


@pytest.fixture
def looms(tmp_path: Path) -> Path:
    """A package with an accelerator of four devices, which every machine has."""
    (tmp_path / "looms.py").write_text(LOOMS)
    (tmp_path / "looms_impl.py").write_text(IMPLEMENTATION)
    info = tmp_path / "torchweft_looms-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchweft-looms\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[torchweft]\nlooms = looms\n")
    return tmp_path


def environment(looms: Path, **extra: str) -> Mapping[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHWEFT_")}
    return {**kept, "PYTHONPATH": str(looms), **extra}


def plan(looms: Path, *args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torchweft", "plan", *args],
        env=environment(looms, **extra),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def planned(looms: Path, *args: str, **extra: str) -> str:
    done = plan(looms, *args, **extra)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refused(looms: Path, status: int, *args: str, **extra: str) -> str:
    """The one line of an error, without its label."""
    done = plan(looms, *args, **extra)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ").rstrip()


def test_what_was_decided_why_and_what_was_rejected(looms: Path) -> None:
    lines = planned(looms, "--devices", "2").splitlines()
    assert lines[:2] == ["weave on 2 x loom, 32-true, launched by mill", ""]
    (strategy,) = (line for line in lines if line.startswith("strategy"))
    assert strategy.startswith("strategy    weave  (torchweft-looms 0.3; asked for: auto; ")
    refused = f"{'':12}  not 'single_device' (torchweft {__version__}): it runs one process on one"
    assert any(line.startswith(refused) for line in lines)
    assert lines[-1] == "processes   2  (2 on this node, devices 0, 1)"


def test_what_was_asked_for_is_shown_as_it_was_written(looms: Path) -> None:
    shown = planned(looms, "--strategy", "weave_spawn", "--devices", "1,3")
    assert shown.startswith("weave on 2 x loom, 32-true, launched by spawn\n")
    assert "asked for: weave_spawn" in shown
    assert "devices 1, 3)" in shown


def test_the_cpu_by_name(looms: Path) -> None:
    shown = planned(looms, "--accelerator", "cpu", "--precision", "32")
    assert shown.startswith("single_device on 1 x cpu, 32-true, launched by inline\n")


def test_several_nodes(looms: Path) -> None:
    shown = planned(looms, "--devices", "2", "--num-nodes", "2:4")
    assert shown.splitlines()[-1] == (
        "processes   at most 8  (2 on each of 2 to 4 nodes, devices 0, 1)"
    )


def test_several_nodes_that_nothing_here_starts(looms: Path) -> None:
    shown = planned(looms, "--accelerator", "cpu", "--strategy", "ddp", "--num-nodes", "1:3")
    assert shown.startswith("ddp on 1 x cpu on each of 3 nodes, 32-true, launched by torchrun\n")
    assert shown.splitlines()[-3:] == [
        "processes   3  (1 on each of 3 nodes, devices 0)",
        (
            "note        no launcher here starts processes on other nodes; this is what a rank "
            "decides where 'torchweft run --devices 1 --num-nodes 1:3 …' was started on every node"
        ),
        (
            "note        nodes that come and go meet by --rdzv-backend c10d, whose store listens "
            "on every interface of its host, and so does rank 0's"
        ),
    ]
    named = refused(looms, 1, "--accelerator", "cpu", "--num-nodes", "2", "--launcher", "script")
    assert "it starts processes on this node alone, and the plan has 2 nodes" in named


def test_json_has_the_documented_keys(looms: Path) -> None:
    given = ("--devices", "2", "--num-nodes", "2:4", "--strategy", "weave:tight=true")
    document = json.loads(planned(looms, "--json", *given))
    decisions = document.pop("decisions")
    assert document == {
        "summary": "weave on 2 x loom on each of 2 to 4 nodes, 32-true, launched by mill",
        "accelerator": "loom",
        "strategy": "weave",
        "precision": "32-true",
        "launcher": "mill",
        "topology": {
            "num_nodes": [2, 4],
            "processes_per_node": 2,
            "devices": [0, 1],
            "world_size": 8,
        },
        "options": {"strategy": {"tight": True}},
        "notes": [],
    }
    assert [decision["kind"] for decision in decisions] == [
        "accelerator",
        "strategy",
        "precision",
        "launcher",
    ]
    strategy = decisions[1]
    assert set(strategy) == {"kind", "wanted", "name", "provider", "why", "rejected"}
    assert (strategy["name"], strategy["provider"]) == ("weave", "torchweft-looms 0.3")
    assert all(set(r) == {"name", "provider", "reason", "hint"} for r in decisions[3]["rejected"])
    assert "inline" in {rejected["name"] for rejected in decisions[3]["rejected"]}


def test_json_holds_hints_and_notes(looms: Path) -> None:
    (looms / "torn.py").write_text("import torn_library")
    info = looms / "torchweft_torn-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchweft-torn\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[torchweft]\ntorn = torn\n")
    code = (looms / "looms.py").read_text()
    blunt = 'return Availability(ok=False, reason="the looms are blunt", hint="sharpen them")'
    (looms / "looms.py").write_text(code.replace("return Availability(ok=True, count=4)", blunt))
    document = json.loads(planned(looms, "--json"))
    rejected = {each["name"]: each for each in document["decisions"][0]["rejected"]}
    assert rejected["loom"] == {
        "name": "loom",
        "provider": "torchweft-looms 0.3",
        "reason": "the looms are blunt",
        "hint": "sharpen them",
    }
    note = (
        "plugin 'torn' (torchweft-torn 0.1) failed to load: "
        "ModuleNotFoundError: No module named 'torn_library'"
    )
    assert document["notes"] == [note]
    assert planned(looms).splitlines()[-1] == f"{'note':12}{note}"


def test_options_are_checked_and_shown(looms: Path) -> None:
    shown = planned(looms, "--devices", "2", "--strategy", "weave:threads=4")
    assert f"\n{'':12}  with threads=4\n" in shown
    assert refused(looms, 2, "--strategy", "weave:thread=4") == (
        "strategy 'weave' has no option 'thread'; did you mean 'threads'? options of Weave: "
        "threads, tight"
    )


@pytest.mark.parametrize(
    ("strategy", "expected"), [("weave", False), ("weave_spawn", False), ("weave:tight=true", True)]
)
def test_torch_is_imported_for_options_alone(looms: Path, strategy: str, expected: bool) -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from torchweft.cli import main\n"
        f"main(['plan', '--devices', '2', '--strategy', {strategy!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(looms),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    imported = set(done.stderr.split())
    assert ("torch" in imported) is expected
    assert "rich" not in imported


def test_an_unknown_strategy_names_the_nearest(looms: Path) -> None:
    said = refused(looms, 2, "--strategy", "weaves")
    assert said.startswith("no strategy is called 'weaves'")
    assert "; did you mean 'weave'? known here: auto, " in said


def test_a_known_name_says_what_to_install(looms: Path) -> None:
    said = refused(looms, 1, "--strategy", "xla_fsdp")
    assert said.startswith("strategy 'xla_fsdp'")
    assert said.endswith("is in a package that is not installed; try: pip install torchweft-xla")


def test_more_devices_than_there_are(looms: Path) -> None:
    said = refused(looms, 1, "--accelerator", "loom", "--devices", "5")
    assert "'loom'" in said
    assert "5" in said
    assert "4" in said


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ("0", "devices='0' asks for 0 devices; it takes 1 or more, or -1 ('all') for all"),
        ("1,1", "devices='1,1' names device 1 more than once; each process needs a device of its"),
        ("two", "devices='two' is not understood; it takes a number of devices, 'auto', 'all', or"),
    ],
)
def test_devices_that_cannot_mean_anything(looms: Path, devices: str, words: str) -> None:
    assert refused(looms, 2, "--devices", devices).startswith(words)


def test_a_plugin_objects(looms: Path) -> None:
    said = refused(looms, 1, "--devices", "3")
    assert said == "three looms tangle; take two or four (says torchweft-looms 0.3)"


def test_the_environment_and_a_flag_disagree(looms: Path) -> None:
    said = refused(looms, 2, "--launcher", "spawn", TORCHWEFT_LAUNCHER="fork")
    assert said == (
        "TORCHWEFT_LAUNCHER says 'fork' and --launcher says 'spawn'; "
        "leave one of them out, or make them equal"
    )


def test_the_environment_is_part_of_the_request(looms: Path) -> None:
    shown = planned(looms, "--devices", "2", TORCHWEFT_LAUNCHER="spawn")
    assert shown.startswith("weave on 2 x loom, 32-true, launched by spawn\n")
