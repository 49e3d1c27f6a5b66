"""``torchweft new``: what it writes is built, installed as a stranger would, and tests itself."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.endtoend.commands import Result, clean_environment
from tests.endtoend.packaging import (
    Built,
    Fresh,
    build_once,
    make_fresh,
    make_testing,
    only,
)

#: By kind, the name of a package.
NAMES = {
    "accelerator": "far-cores",
    "strategy": "far-mean",
    "precision": "far-bits",
    "launcher": "far-grid",
}

KINDS = pytest.mark.parametrize("kind", NAMES)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A package of each kind, installed together.

    Attributes:
        fresh: the environment, in which there is no other plugin.
        folders: of the packages, by kind.
        wheels: where they were built.
        told: what the command printed, by kind.
    """

    fresh: Fresh
    folders: dict[str, Path]
    wheels: Path
    told: dict[str, str]


@pytest.fixture(scope="session")
def built(pytestconfig, tmp_path_factory) -> Built:
    return build_once(pytestconfig, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def written(built, tmp_path_factory) -> Written:
    """Written by the command of the installed wheel, so that the wheel has the templates."""
    folder = tmp_path_factory.mktemp("new")
    fresh = make_fresh(folder / "env", built.dependencies)
    make_testing(fresh, folder / "pytest")
    fresh.install(only(built.core, "*.whl"))
    wheels = folder / "wheels"

    def make(kind: str) -> str:
        told = call(fresh, folder, str(fresh.command), "new", kind, NAMES[kind])
        package = folder / f"torchweft-{NAMES[kind]}"
        # With the tools of the environment that runs the tests; an index would be asked for others.
        build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir"]
        call(fresh, folder, *build, str(wheels), str(package))
        return told

    with ThreadPoolExecutor(2) as pool:
        told = dict(zip(NAMES, pool.map(make, NAMES), strict=True))
    names = [f"torchweft-{name}[test]" for name in NAMES.values()]
    fresh.install(*names, find_links=[wheels, built.core])
    return Written(
        fresh=fresh,
        folders={kind: folder / f"torchweft-{name}" for kind, name in NAMES.items()},
        wheels=wheels,
        told=told,
    )


def call(fresh: Fresh, folder: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(fresh.environ() if command[0] == str(fresh.command) else {}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- it is there -----------------------------------------------------------------------------------


@KINDS
def test_it_is_found_and_can_be_used(
    run: Callable[..., Result], written: Written, kind: str
) -> None:
    name = NAMES[kind]
    document = written.fresh.plugins(run)
    assert {plugin["name"] for plugin in document["plugins"]} == {"builtin", *NAMES.values()}
    (row,) = [row for row in document["rows"] if row["name"] == name]
    assert (row["kind"], row["provider"]) == (kind, f"torchweft-{name} 0.1.0")
    assert row["available"]
    assert row["clash"] == ""


@KINDS
def test_the_last_of_the_commands_that_are_printed(
    run: Callable[..., Result], written: Written, kind: str
) -> None:
    install, test, plan = written.told[kind].rpartition("To go on:\n")[2].splitlines()
    folder = f"torchweft-{NAMES[kind]}"
    assert shlex.split(install) == ["pip", "install", "-e", f"{folder}[test]"]
    assert shlex.split(test) == ["pytest", folder]
    path = os.pathsep.join([str(written.fresh.python.parent), os.environ["PATH"]])
    # Looked up here: a new process is looked up in the PATH of the old one.
    command, *arguments = shlex.split(plan)
    found = shutil.which(command, path=path)
    assert found is not None
    result = run(found, *arguments, environ=written.fresh.environ(PATH=path))
    assert result.status == 0, result.err
    (line,) = [line for line in result.lines if line.startswith(kind)]
    assert NAMES[kind] in line


@KINDS
def test_a_wheel_holds_the_package_alone(written: Written, kind: str) -> None:
    name = NAMES[kind].replace("-", "_")
    with zipfile.ZipFile(only(written.wheels, f"torchweft_{name}-*.whl")) as archive:
        names = set(archive.namelist())
    package = written.folders[kind] / f"torchweft_{name}"
    expected = {f"torchweft_{name}/{path.name}" for path in package.iterdir() if path.is_file()}
    assert f"torchweft_{name}/py.typed" in expected
    info = {f"torchweft_{name}-0.1.0.dist-info/{file}" for file in DESCRIBED}
    assert names == expected | info


DESCRIBED = ("METADATA", "WHEEL", "RECORD", "entry_points.txt")


# -- it passes its own tests -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run of pytest came to: tests by class, and why some were skipped."""

    passed: dict[str, int]
    skipped: dict[str, str]
    failed: list[str]


def report(path: Path) -> Report:
    passed: dict[str, int] = {}
    skipped: dict[str, str] = {}
    failed: list[str] = []
    for case in ElementTree.parse(path).iter("testcase"):
        cls = case.get("classname", "").rpartition(".")[2]
        skip = case.find("skipped")
        if skip is not None:
            skipped[f"{cls}.{case.get('name')}"] = skip.get("message", "")
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{cls}.{case.get('name')}")
        else:
            passed[cls] = passed.get(cls, 0) + 1
    return Report(passed=passed, skipped=skipped, failed=failed)


#: Why tests are skipped in every package: its plugin does not declare what they are about.
_NOT_DECLARED = (
    r"plugin '{name}' declares none",
    r"torchweft-{name} 0\.1\.0 does not implement torchweft_\w+\(\)",
)

#: Why else, by kind.
SKIPPED = {
    "accelerator": (
        r"the probe does not say no here",
        r"it can be used here",
        r"accelerator '{name}': single devices cannot be chosen \(selectable=False\)",
    ),
    "strategy": (),
    "precision": (r"precision '{name}' does not scale the loss",),
    "launcher": (
        r"launcher '{name}' needs no function \(LauncherSpec\.function\)",
        r"launcher '{name}' does not own its ranks: no process calls for them",
    ),
}


# Four kinds of ranks on a machine that may be busy.
@pytest.mark.timeout(240)
@KINDS
def test_it_passes_its_own_tests(
    run: Callable[..., Result], written: Written, kind: str, tmp_path: Path
) -> None:
    fresh, folder, name = written.fresh, written.folders[kind], NAMES[kind]
    xml = tmp_path / "report.xml"
    result = run(
        *(fresh.python, "-m", "pytest", "--junit-xml", xml),
        environ=fresh.environ(),
        cwd=folder,
        timeout=220,
    )
    assert result.status == 0, result.out + result.err
    found = report(xml)
    assert found.failed == []
    cls = "Test" + "".join(word.capitalize() for word in [*name.split("-"), kind])
    # The kit's own for a plugin and for the kind, and what the package adds.
    assert set(found.passed) == {"TestPlugin", cls, f"test_{name.replace('-', '_')}"}
    assert min(found.passed["TestPlugin"], found.passed[cls]) > 10
    known = [reason.format(name=name) for reason in (*_NOT_DECLARED, *SKIPPED[kind])]
    reasons = set(found.skipped.values())
    assert [r for r in reasons if not any(re.fullmatch(k, r) for k in known)] == []
    assert [k for k in known if not any(re.fullmatch(k, r) for r in reasons)] == []
    counts = re.search(r"(\d+) passed, (\d+) skipped", result.lines[-1])
    assert counts is not None, result.out
    assert int(counts[1]) == sum(found.passed.values())
    assert int(counts[2]) == len(found.skipped)
