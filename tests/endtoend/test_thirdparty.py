"""Plugins of third parties: real packages, built, installed beside the others, chosen by name."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import socket
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.endtoend.packaging import (
    THIRD_PARTY,
    TRAIN,
    Built,
    Fresh,
    build_once,
    distance,
    make_fresh,
    make_testing,
    only,
    trained_alone,
)
from torchweft.api import Accelerator, Launcher, Precision, Strategy

TRAINED = "trained by torchweft_acme.strategy:AcmeStrategy"

BROKEN = (
    "plugin 'broken' (torchweft-broken 0.4) failed to load: "
    "ModuleNotFoundError: No module named 'broken_comm'"
)

CLASH = (
    "is declared by both torchweft-clash 1.0 and torchweft-cuda {version}, for the same devices "
    "and strategies; uninstall one of them, or leave one out with "
    "TORCHWEFT_DISABLE_PLUGINS=clash or TORCHWEFT_DISABLE_PLUGINS=cuda"
)


@pytest.fixture(scope="session")
def built(pytestconfig, tmp_path_factory) -> Built:
    return build_once(pytestconfig, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def acme(built, tmp_path_factory) -> Fresh:
    """A sound plugin, and beside it one that cannot be imported."""
    fresh = make_fresh(tmp_path_factory.mktemp("acme") / "env", built.dependencies)
    places = [built.core, built.cuda, built.acme, built.broken]
    # By name, so that what they require is found and checked too.
    fresh.install("torchweft-acme", "torchweft-broken", "torchweft-cuda", find_links=places)
    return fresh


@pytest.fixture(scope="module")
def clash(built, tmp_path_factory) -> Fresh:
    """Two plugins with a strategy of the same name for the same devices."""
    fresh = make_fresh(tmp_path_factory.mktemp("clash") / "env", built.dependencies)
    fresh.install(*(only(folder, "*.whl") for folder in (built.core, built.cuda, built.clash)))
    return fresh


@pytest.fixture(scope="module")
def cuda_version(built) -> str:
    (version,) = re.findall(r"torchweft_cuda-(.+?)-", only(built.cuda, "*.whl").name)
    return version


# -- what a third party may use ----------------------------------------------------------------


def test_the_plugin_uses_the_public_door_alone():
    package = THIRD_PARTY / "torchweft-acme" / "torchweft_acme"
    imported = {
        name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if name.split(".")[0].startswith("torchweft")
    }
    assert imported == {"torchweft.api", "torchweft.hookspecs", "torchweft.specs"}


# -- a strategy of their own -------------------------------------------------------------------


def test_it_is_listed_with_who_provides_it(run, acme):
    document = acme.plugins(run)
    assert {p["name"] for p in document["plugins"]} == {"acme", "broken", "builtin", "cuda"}
    (row,) = [row for row in document["rows"] if row["provider"] == "torchweft-acme 2.5"]
    assert (row["kind"], row["name"], row["aliases"]) == ("strategy", "acme", ["acme_compressed"])
    assert row["available"]
    assert row["clash"] == ""


@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_two_processes_end_with_the_parameters_of_one(run, acme, tmp_path, way):
    path = tmp_path / "model.ckpt"
    command = {
        "python": [acme.python, TRAIN, path, "acme"],
        "torchweft run": [acme.command, "run", "--devices", "2", "--strategy", "acme", TRAIN, path],
    }[way]
    result = run(*command, environ=acme.environ())
    assert (result.status, result.lines) == (0, [TRAINED]), result.err
    assert distance(path, trained_alone()) < 1e-10


def test_its_option_reaches_it(run, acme, tmp_path):
    path = tmp_path / "model.ckpt"
    result = run(acme.python, TRAIN, path, "acme:compress=true", environ=acme.environ())
    assert (result.status, result.lines) == (0, [TRAINED]), result.err
    # bfloat16 has eight bits of precision: close, and not the same.
    assert 1e-6 < distance(path, trained_alone()) < 0.5


def test_its_options_are_checked_before_any_process_starts(run, acme):
    arguments = ["--devices", "2", "--strategy", "acme:compres=true", TRAIN, "never.ckpt"]
    result = run(acme.command, "run", *arguments, environ=acme.environ())
    assert result.status == 2
    assert result.err == (
        "error: strategy 'acme' has no option 'compres'; did you mean 'compress'? "
        "options of AcmeStrategy: compress\n"
    )


# -- proven right by the kit -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tested(built, tmp_path_factory) -> Fresh:
    """Two third parties' strategies and pytest, without torchweft-cuda."""
    folder = tmp_path_factory.mktemp("tested")
    fresh = make_fresh(folder / "env", built.dependencies)
    make_testing(fresh, folder / "pytest")
    places = [built.core, built.acme, built.localsgd]
    fresh.install("torchweft-acme", "torchweft-localsgd", find_links=places)
    return fresh


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["acme", "localsgd"])
def test_it_passes_the_conformance_kit(run, tested, name, tmp_path):
    tests = shutil.copytree(THIRD_PARTY / f"torchweft-{name}" / "tests", tmp_path / "tests")
    xml = tmp_path / "report.xml"
    result = run(
        *(tested.python, "-m", "pytest", "-W", "error", "--junit-xml", xml, tests),
        environ=tested.environ(),
        cwd=tmp_path,
        timeout=220,
    )
    assert result.status == 0, result.out + result.err
    cases = [*ElementTree.parse(xml).iter("testcase")]
    skips = {
        case.find("skipped").get("message") for case in cases if case.find("skipped") is not None
    }
    classes = {case.get("classname").rpartition(".")[2] for case in cases}
    assert len(cases) > 130
    assert len(classes) == 2
    # What is left out is what the strategy says of itself, or what the plugin does not declare.
    known = {
        "acme": (),
        "localsgd": ("gradients are never averaged, so that they have no norm in common",),
    }[name]
    said = [skip for skip in skips if "cannot:" in skip]
    assert all(any(words in skip for words in known) for skip in said), said
    assert bool(said) == bool(known)


# -- a plugin that cannot be imported ----------------------------------------------------------


def test_a_broken_plugin_is_listed_with_its_error(run, acme):
    document = acme.plugins(run)
    errors = {plugin["name"]: plugin["error"] for plugin in document["plugins"]}
    assert errors.pop("broken") == "ModuleNotFoundError: No module named 'broken_comm'"
    assert set(errors.values()) == {""}


def test_a_broken_plugin_is_named_when_it_might_provide_what_is_asked(run, acme):
    arguments = ["--devices", "2", "--strategy", "shard_2"]
    result = run(acme.command, "plan", *arguments, environ=acme.environ())
    assert result.status == 1
    told = re.fullmatch(
        r"error: no strategy is called 'shard_2' \(--strategy\); known here: (.+); it might come "
        rf"from a plugin that is not loaded: {re.escape(BROKEN)}\n",
        result.err,
    )
    assert told, result.err
    assert {"acme", "ddp", "single_device"} <= set(told[1].split(", "))


def test_a_broken_plugin_is_not_named_otherwise(run, acme):
    result = run(acme.command, "plan", "--strategy", "ddp:x=1", environ=acme.environ())
    assert result.status == 2
    assert "has no option 'x'" in result.err
    assert "broken" not in result.err


# -- a plugin that takes a name that is taken --------------------------------------------------


def test_a_clash_is_marked_on_both_sides(run, clash, cuda_version):
    rows = [row for row in clash.plugins(run)["rows"] if row["clash"]]
    assert {row["provider"]: row["clash"] for row in rows} == {
        "torchweft-clash 1.0": f"'ddp' is also declared by torchweft-cuda {cuda_version}",
        f"torchweft-cuda {cuda_version}": "'ddp' is also declared by torchweft-clash 1.0",
    }
    assert {(row["kind"], row["name"]) for row in rows} == {("strategy", "ddp")}
    listing = run(clash.command, "plugins", environ=clash.environ()).lines
    assert [line.split()[:3] for line in listing if " clash " in line and "ddp" in line] == [
        ["strategy", "ddp", "clash"]
    ] * 2


def test_fabric_names_both_providers(run, clash, cuda_version, tmp_path):
    result = run(clash.python, TRAIN, tmp_path / "never.ckpt", "ddp", environ=clash.environ())
    assert result.status == 1
    assert result.err.splitlines()[-1] == (
        f"torchweft.errors.NameClash: strategy 'ddp' {CLASH.format(version=cuda_version)}"
    )


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_command_names_both_providers(run, clash, cuda_version, command):
    arguments = ["--devices", "2", "--strategy", "ddp"]
    script = [TRAIN, "never.ckpt"] if command == "run" else []
    result = run(clash.command, command, *arguments, *script, environ=clash.environ())
    assert result.status == 1
    assert result.err == (
        f"error: strategy 'ddp' (--strategy) {CLASH.format(version=cuda_version)}\n"
    )


def test_disabling_one_of_the_two_heals_it(run, clash, tmp_path):
    path = tmp_path / "model.ckpt"
    environ = clash.environ(TORCHWEFT_DISABLE_PLUGINS="clash")
    document = clash.plugins(run, TORCHWEFT_DISABLE_PLUGINS="clash")
    assert [row["clash"] for row in document["rows"] if row["clash"]] == []
    result = run(clash.python, TRAIN, path, "ddp", environ=environ)
    assert (result.status, result.lines) == (0, ["trained by torchweft_cuda.ddp:DDPStrategy"])
    assert distance(path, trained_alone()) < 1e-10


# -- the examples that plugin authors start from -------------------------------------------------

PRELUDE = "import torch\nfrom torchweft.api import *\n"

HOOKS = """
from torchweft.hookspecs import hookimpl
from torchweft.specs import *

@hookimpl
def {hook}():
    return [{spec}]
"""


def install_example(folder: Path, cls: type, **modules: str) -> dict[str, str]:
    """Make a plugin of the example in a base class's docstring; the environment that has it.

    ``modules``: how the other modules of its package begin; a second block of the docstring
    follows.
    """
    page = inspect.getdoc(cls)
    (spec,) = re.findall(r"``(\w+Spec\(.*?\))``", page, flags=re.DOTALL)
    first, *more = map(textwrap.dedent, re.findall(r"::\n\n((?:    .*\n|\n)+)", f"{page}\n"))
    (module,) = re.findall(r'target="my_package\.(\w+):', spec)
    package = folder / "my_package"
    package.mkdir()
    kind = cls.__name__.lower()
    hook = "torchweft_strategies" if kind == "strategy" else f"torchweft_{kind}s"
    files = {
        "__init__": "",
        "hooks": HOOKS.format(hook=hook, spec=spec),
        module: PRELUDE + first,
        **{name: code + "".join(more) for name, code in modules.items()},
    }
    for name, code in files.items():
        (package / f"{name}.py").write_text(code)
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchweft]\nmine = my_package.hooks\n")
    return {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}


def test_the_strategy_of_the_docstring_trains(run, tmp_path):
    environ = install_example(tmp_path, Strategy)
    path = tmp_path / "model.ckpt"
    result = run(sys.executable, TRAIN, path, "mean", environ=environ)
    assert (result.status, result.lines) == (0, ["trained by my_package.mean:Mean"]), result.err
    assert distance(path, trained_alone()) < 1e-10


@pytest.mark.timeout(240)
def test_the_strategy_of_the_docstring_passes_the_conformance_kit(run, tmp_path):
    environ = install_example(tmp_path, Strategy)
    (tmp_path / "test_mean.py").write_text(
        "from torchweft.testing import StrategyConformance\n\n\n"
        "class TestMean(StrategyConformance):\n"
        '    strategy = "mean"\n'
    )
    command = [sys.executable, "-m", "pytest", "-W", "error", "-q", "-p", "no:cacheprovider"]
    result = run(*command, tmp_path / "test_mean.py", environ=environ, cwd=tmp_path, timeout=220)
    assert result.status == 0, result.out + result.err
    passed, skipped = re.search(r"(\d+) passed, (\d+) skipped", result.out).groups()
    # It says itself that it takes no unused parameters.
    assert (int(passed) > 100, skipped) == (True, "1")


def test_the_launcher_of_the_docstring_joins_ranks_of_a_cluster(start, tmp_path):
    environ = install_example(tmp_path, Launcher, detect="from torchweft.specs import Detection\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        head = f"127.0.0.1:{free.getsockname()[1]}"
    path = tmp_path / "model.ckpt"
    cluster = {"GRID_JOB": "7", "GRID_TASKS": "2", "GRID_LOCAL_TASKS": "2", "GRID_HEAD": head}
    ranks = [
        start(
            *(sys.executable, TRAIN, path),
            environ={**environ, **cluster, "GRID_TASK": task, "GRID_LOCAL_TASK": task},
        )
        for task in ("0", "1")
    ]
    results = [rank.finish() for rank in ranks]
    assert [result.status for result in results] == [0, 0], results[0].err + results[1].err
    # Two ranks of one run, of which the first speaks, and not a run by each.
    lines = [result.lines for result in results]
    assert lines == [["trained by torchweft_cuda.ddp:DDPStrategy"], []]
    assert distance(path, trained_alone()) < 1e-10


def test_the_precision_of_the_docstring_is_set_in_the_rank(run, tmp_path):
    environ = install_example(tmp_path, Precision)
    code = (
        "import torch, torchweft\n"
        "fabric = torchweft.Fabric(accelerator='cpu', precision='32-medium')\n"
        "before = torch.get_float32_matmul_precision()\n"
        "fabric.launch()\n"
        "print(before, torch.get_float32_matmul_precision())\n"
    )
    result = run(sys.executable, "-W", "error", "-c", code, environ=environ)
    assert (result.status, result.lines) == (0, ["highest medium"]), result.err


# torch lets a device of another make have a name and a module; nothing is computed on it here.
NPU = """
import types, torch, torchweft
calls = []
npu = types.ModuleType("npu")
npu.set_device = lambda device: calls.append(str(device))
npu.synchronize = lambda: calls.append("synchronize")
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
fabric = torchweft.Fabric(accelerator="npu", devices=[2])
assert not calls, "a device was touched before launch()"
fabric.launch()
fabric.accelerator.synchronize()
print(fabric.device, *calls)
"""


def test_the_accelerator_of_the_docstring_binds_the_device_that_was_asked_for(run, tmp_path):
    probe = (
        "from torchweft.specs import Availability\n"
        "def npu():\n"
        "    return Availability(ok=True, count=4)\n"
    )
    environ = install_example(tmp_path, Accelerator, probe=probe)
    result = run(sys.executable, "-c", NPU, environ=environ)
    assert (result.status, result.lines) == (0, ["npu:2 npu:2 synchronize"]), result.err
