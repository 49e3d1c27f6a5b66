"""The distributions: what is in them, what they say of themselves, and that they work installed."""

from __future__ import annotations

import importlib.metadata
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from tests.endtoend.packaging import (
    ROOT,
    TRAIN,
    Built,
    Fresh,
    build_once,
    distance,
    make_fresh,
    only,
    trained_alone,
)
from torchweft_cuda import hooks as cuda_hooks
from torchweft_deepspeed import hooks as deepspeed_hooks
from torchweft_deepspeed.probe import deepspeed as deepspeed_probe

#: Package folder in the tree, by import name.
PACKAGES = {
    "torchweft": "core/torchweft",
    "torchweft_cuda": "plugins/cuda/torchweft_cuda",
    "torchweft_deepspeed": "plugins/deepspeed/torchweft_deepspeed",
}

#: Those that came into a project as plugins.
PLUGINS = {"torchweft_cuda": cuda_hooks, "torchweft_deepspeed": deepspeed_hooks}

#: Where each has its ``pyproject.toml``.
HOMES = {
    "torchweft": ".",
    "torchweft_cuda": "plugins/cuda",
    "torchweft_deepspeed": "plugins/deepspeed",
}

NAMES = pytest.mark.parametrize("name", PACKAGES)


@pytest.fixture(scope="session")
def built(pytestconfig, tmp_path_factory) -> Built:
    return build_once(pytestconfig, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def alone(built, tmp_path_factory) -> Fresh:
    """The core without any plugin."""
    fresh = make_fresh(tmp_path_factory.mktemp("alone") / "env", built.dependencies)
    fresh.install(only(built.core, "*.whl"))
    return fresh


@pytest.fixture(scope="module")
def both(built, tmp_path_factory) -> Fresh:
    """The core with its extra, as the documentation says: pip install "torchweft[cuda]"."""
    fresh = make_fresh(tmp_path_factory.mktemp("both") / "env", built.dependencies)
    fresh.install("torchweft[cuda]", find_links=[built.core, built.cuda])
    return fresh


@pytest.fixture(scope="module")
def zero(built, tmp_path_factory) -> Fresh:
    """The core with the extra for DeepSpeed."""
    fresh = make_fresh(tmp_path_factory.mktemp("zero") / "env", built.dependencies)
    fresh.install("torchweft[deepspeed]", find_links=[built.core, built.deepspeed])
    return fresh


# -- contents ----------------------------------------------------------------------------------


def folder(built: Built, name: str) -> Path:
    return {
        "torchweft": built.core,
        "torchweft_cuda": built.cuda,
        "torchweft_deepspeed": built.deepspeed,
    }[name]


def version(built: Built, name: str) -> str:
    """What the package says in its own source."""
    source = (built.tree / PACKAGES[name] / "__init__.py").read_text()
    (found,) = re.findall(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    return found


def sources(built: Built, name: str) -> set[str]:
    """Everything that belongs to a package, as it is named in an archive."""
    package = built.tree / PACKAGES[name]
    modules = [
        path
        for path in package.rglob("*")
        if path.suffix in (".py", ".template") and "__pycache__" not in path.parts
    ]
    return {str(path.relative_to(package.parent)) for path in [*modules, package / "py.typed"]}


def wheel(folder: Path, name: str) -> dict[str, bytes]:
    with zipfile.ZipFile(only(folder, f"{name}-*.whl")) as archive:
        return {item: archive.read(item) for item in archive.namelist()}


def metadata(built: Built, name: str) -> Metadata:
    files = wheel(folder(built, name), name)
    (raw,) = [data for item, data in files.items() if item.endswith(".dist-info/METADATA")]
    return Metadata.from_email(raw, validate=True)


def entry_points(built: Built, name: str) -> set[tuple[str, str, str]]:
    archive = only(folder(built, name), f"{name}-*.whl")
    info = zipfile.Path(archive, f"{name}-{version(built, name)}.dist-info/")
    found = importlib.metadata.PathDistribution(info).entry_points
    return {(entry.group, entry.name, entry.value) for entry in found}


@NAMES
def test_a_wheel_holds_the_package_and_nothing_else(built, name):
    info = f"{name}-{version(built, name)}.dist-info"
    described = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    expected = sources(built, name) | {f"{info}/{item}" for item in described}
    files = wheel(folder(built, name), name)
    assert set(files) == expected
    assert f"{name}/py.typed" in files
    assert files[f"{info}/licenses/LICENSE"] == (built.tree / "LICENSE").read_bytes()


@NAMES
def test_a_source_archive_holds_what_a_wheel_is_made_of(built, name):
    root = f"{name}-{version(built, name)}"
    with tarfile.open(only(folder(built, name), f"{name}-*.tar.gz")) as archive:
        files = set(archive.getnames())
    package = "core/" if name == "torchweft" else ""
    # The build tool adds the tree's own list of what is not to be packed.
    beside = {"pyproject.toml", "PKG-INFO", "LICENSE", "README.md", "CHANGELOG.md", ".gitignore"}
    assert files == {f"{root}/{item}" for item in beside} | {
        f"{root}/{package}{item}" for item in sources(built, name)
    }


@NAMES
def test_a_wheel_from_the_archive_is_the_one_from_the_tree(built, name):
    assert wheel(folder(built, name), name) == wheel(built.direct, name)


# -- metadata ----------------------------------------------------------------------------------


@NAMES
def test_metadata(built, name):
    found = metadata(built, name)
    assert found.name == name.replace("_", "-")
    assert str(found.version) == version(built, name)
    assert str(found.requires_python) == ">=3.10"
    assert found.license_expression == "Apache-2.0"
    assert found.license_files == ["LICENSE"]
    assert found.description_content_type == "text/markdown"
    assert found.description == (built.tree / HOMES[name] / "README.md").read_text()
    assert "Typing :: Typed" in found.classifiers
    pythons = {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)}
    assert pythons <= set(found.classifiers)


def test_every_dependency_of_the_core_is_declared(built):
    required = {r.name for r in metadata(built, "torchweft").requires_dist if r.marker is None}
    assert required == {"torch", "numpy", "pluggy", "importlib-metadata", "click", "rich"}


def test_extras(built):
    found = metadata(built, "torchweft")
    plugins = {"cuda", "deepspeed", "ray", "xla"}
    named = plugins | {"all", "testing", "logs", "safetensors", "examples", "dev"}
    assert set(found.provides_extra) == named
    extras = {
        extra: {
            r.name
            for r in found.requires_dist
            if r.marker is not None and r.marker.evaluate({"extra": extra})
        }
        for extra in found.provides_extra
    }
    assert extras["cuda"] == {"torchweft-cuda"}
    assert extras["xla"] == {"torchweft-xla"}
    assert extras["deepspeed"] == {"torchweft-deepspeed"}
    assert extras["ray"] == {"torchweft-ray"}
    assert extras["all"] >= extras["cuda"]
    assert extras["testing"] == {"pytest"}
    assert extras["logs"] == {"tensorboard", "matplotlib", "plotext"}
    assert extras["examples"] == {
        "scikit-learn",
        "gymnasium",
        "torchmetrics",
        "nbclient",
        "ipykernel",
    }
    assert extras["dev"] >= extras["logs"] | extras["examples"]
    assert extras["dev"] >= {"pytest", "mypy", "ruff", "build", "hatchling", "scikit-learn"}


@pytest.mark.parametrize(
    ("name", "others"), [("torchweft_cuda", set()), ("torchweft_deepspeed", {"deepspeed", "ninja"})]
)
def test_core_and_plugin_of_one_release_ask_for_each_other(built, name, others):
    core, plugin = metadata(built, "torchweft"), metadata(built, name)
    (asked,) = {r.specifier for r in core.requires_dist if r.name == plugin.name}
    assert plugin.version in asked
    needs = {r.name: r.specifier for r in plugin.requires_dist}
    assert set(needs) == {"torchweft", "torch"} | others
    assert core.version in needs["torchweft"]
    # Both speak of the same torch.
    assert needs["torch"] in [r.specifier for r in core.requires_dist if r.name == "torch"]


def test_entry_points(built):
    assert entry_points(built, "torchweft") == {
        ("console_scripts", "torchweft", "torchweft.cli:main"),
        ("torchweft", "builtin", "torchweft.builtin.hooks"),
        ("pytest11", "torchweft", "torchweft.testing.fixtures"),
    }
    assert entry_points(built, "torchweft_cuda") == {
        ("torchweft", "cuda", "torchweft_cuda.hooks"),
    }
    assert entry_points(built, "torchweft_deepspeed") == {
        ("torchweft", "deepspeed", "torchweft_deepspeed.hooks"),
    }


@pytest.mark.parametrize("name", PLUGINS)
def test_the_readme_of_a_plugin_names_what_it_declares(name):
    rows = re.findall(
        r"^\| (\w+) \| `(.+?)` \| (.*?) \|",
        (ROOT / HOMES[name] / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    kinds = ("accelerators", "strategies", "precisions", "launchers")
    declaring = [getattr(PLUGINS[name], f"torchweft_{kind}", list) for kind in kinds]
    declared = [spec for declare in declaring for spec in declare()]
    assert [(kind, name, re.findall("`(.+?)`", also)) for kind, name, also in rows] == [
        (spec.kind, spec.name, list(spec.names()[1:])) for spec in declared
    ]


# -- the core alone ----------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        # What the extra "testing" is for.
        assert (error.name, "torchweft.testing." in found.name) == ("pytest", True), found.name
print(package.__file__, package.__version__)
"""


def test_every_module_needs_only_what_is_declared(run, built, both, zero):
    for name, place in zip(PACKAGES, (both, both, zero), strict=True):
        result = run(place.python, "-W", "error", "-c", IMPORT_ALL, name, environ=place.environ())
        assert result.status == 0, result.err
        path, told = result.out.split()
        # Installed here: nothing reaches through to the tree that the tests run in.
        assert Path(path).is_relative_to(place.folder)
        assert told == version(built, name)


def test_the_conformance_kit_names_the_extra_that_it_needs(run, alone):
    code = "from torchweft.testing import StrategyConformance"
    result = run(alone.python, "-c", code, environ=alone.environ())
    assert result.status == 1
    assert result.err.splitlines()[-1] == (
        "torchweft.errors.NotAvailable: StrategyConformance of torchweft.testing needs pytest, "
        'which is not installed; try: pip install "torchweft[testing]"'
    )


def test_the_core_alone_lists_itself_alone(run, built, alone):
    document = alone.plugins(run)
    mine = f"torchweft {version(built, 'torchweft')}"
    assert [plugin["name"] for plugin in document["plugins"]] == ["builtin"]
    assert {row["provider"] for row in document["rows"]} == {mine}
    assert {row["name"] for row in document["rows"] if row["kind"] == "strategy"} == {
        "single_device"
    }


def test_the_command_and_the_module_are_the_same(run, built, alone):
    expected = f"torchweft {version(built, 'torchweft')}\n"
    for command in ([alone.command], [alone.python, "-m", "torchweft"]):
        result = run(*command, "--version", environ=alone.environ())
        assert (result.status, result.out) == (0, expected), result.err


def test_one_process_needs_no_plugin(run, alone, tmp_path):
    path = tmp_path / "model.ckpt"
    result = run(alone.python, TRAIN, path, environ=alone.environ())
    assert result.status == 0, result.err
    assert distance(path, trained_alone(), ranks=1) < 1e-10


MISSING = "is in a package that is not installed; try: pip install torchweft-cuda"


def test_fabric_names_the_package_that_is_missing(run, alone):
    code = "from torchweft import Fabric; Fabric(strategy='ddp', devices=2)"
    result = run(alone.python, "-c", code, environ=alone.environ())
    assert result.status == 1
    assert result.err.splitlines()[-1] == f"torchweft.errors.NotAvailable: strategy 'ddp' {MISSING}"


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_command_names_the_package_that_is_missing(run, alone, tmp_path, command):
    script = tmp_path / "train.py"
    script.write_text("print('a process was started')")
    arguments = ["--strategy", "ddp", "--devices", "2", *([script] if command == "run" else [])]
    result = run(alone.command, command, *arguments, environ=alone.environ())
    expected = f"error: strategy 'ddp' (--strategy) {MISSING}\n"
    assert (result.status, result.out, result.err) == (1, "", expected)


# -- with the plugin ---------------------------------------------------------------------------


def test_the_plugin_is_listed_with_who_provides_it(run, built, both):
    rows = both.plugins(run)["rows"]
    mine = f"torchweft-cuda {version(built, 'torchweft_cuda')}"
    provided = {(row["kind"], row["name"]) for row in rows if row["provider"] == mine}
    assert {("accelerator", "cuda"), ("strategy", "ddp"), ("precision", "16-mixed")} <= provided


@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_ddp_by_name_on_two_processes(run, both, tmp_path, way):
    path = tmp_path / "model.ckpt"
    command = {
        "python": [both.python, TRAIN, path, "ddp"],
        "torchweft run": [both.command, "run", "--devices", "2", "--strategy", "ddp", TRAIN, path],
    }[way]
    result = run(*command, environ=both.environ())
    assert result.status == 0, result.err
    assert result.lines == ["trained by torchweft_cuda.ddp:DDPStrategy"]
    assert distance(path, trained_alone()) < 1e-10


@pytest.mark.skipif(not deepspeed_probe().ok, reason="needs a C++ compiler and ninja")
@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_zero_by_name_on_two_processes(run, zero, tmp_path, way):
    path, strategy = tmp_path / "model.ckpt", "deepspeed_stage_2"
    command = {
        "python": [zero.python, TRAIN, path, strategy],
        "torchweft run": [zero.command, "run", "--devices=2", "--strategy", strategy, TRAIN, path],
    }[way]
    result = run(*command, environ=zero.environ())
    assert result.status == 0, result.err
    assert result.lines == ["trained by torchweft_deepspeed.strategy:DeepSpeedStrategy"]
    # It steps in 32-bit, whatever the model is in.
    assert distance(path, trained_alone()) < 1e-5
