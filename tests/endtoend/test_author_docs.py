"""``docs/plugins/tutorial.md``: from an empty folder to a pass, as the page says."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.endtoend.commands import clean_environment
from tests.endtoend.packaging import ROOT, Built, Fresh, build_once, make_fresh, only
from tests.pages import Runner, blocks

PAGE = ROOT / "docs" / "plugins" / "tutorial.md"

#: What builds and tests the package of the page, beside what torchweft needs itself.
TOOLS = (
    "hatchling",
    "iniconfig",
    "packaging",
    "pathspec",
    "pygments",
    "pytest",
    "tomlkit",
    "trove-classifiers",
)

#: ``pip`` of the fresh environment, which has no network and no pip of its own.
PIP = """#!/bin/sh
test "$1" = install && shift
exec {outer} -m pip --isolated --python {inner} install --quiet --no-index \\
    --no-build-isolation --disable-pip-version-check --no-cache-dir "$@"
"""

#: As an installer writes it; a fork server imports it again.
PYTEST = """#!{inner}
import sys
import pytest
if __name__ == "__main__":
    sys.exit(pytest.main())
"""


@pytest.fixture(scope="module")
def built(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_once(pytestconfig, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def fresh(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """The core and the tools of an author; no plugin."""
    folder = tmp_path_factory.mktemp("author")
    made = make_fresh(folder / "env", built.dependencies)
    (packages,) = made.folder.glob("lib/python3*/site-packages")
    (packages / "tools.pth").write_text(f"{link(TOOLS, folder / 'tools')}\n")
    made.install(only(built.core, "*.whl"))
    pip = made.folder / "bin" / "pip"
    pip.write_text(PIP.format(outer=sys.executable, inner=made.python))
    pip.chmod(0o755)
    script = made.folder / "bin" / "pytest"
    script.write_text(PYTEST.format(inner=made.python))
    script.chmod(0o755)
    return made


def link(names: Iterable[str], folder: Path) -> Path:
    """Fill a new folder with links to distributions of the environment that runs the tests."""
    folder.mkdir()
    for name in names:
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(str(found.locate_file(top)))
    return folder


@pytest.mark.timeout(400)
def test_the_tutorial(fresh: Fresh, tmp_path: Path) -> None:
    path = os.pathsep.join([str(fresh.python.parent), os.environ["PATH"]])
    environ = clean_environment(fresh.environ(PATH=path, PYTHONUNBUFFERED="1"))
    runner = Runner(tmp_path, environ)
    for block in blocks(PAGE):
        assert block.file or block.word == "console", f"{block.place}: only files and commands"
        runner.run(block)
