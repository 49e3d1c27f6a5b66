"""Whether DeepSpeed can be used here, without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchweft_deepspeed.probe import deepspeed


def _without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    spec, which = importlib.util.find_spec, shutil.which

    def found(name: str, *args: Any) -> Any:
        return None if name in names else spec(name, *args)

    def there(name: str, *args: Any) -> Any:
        return None if name in names else which(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(shutil, "which", there)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"
)
def test_it_is_available_here() -> None:
    assert deepspeed().ok


def test_deepspeed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, "deepspeed")
    answer = deepspeed()
    assert (answer.ok, answer.reason) == (False, "the package deepspeed is not installed")
    assert answer.hint == "pip install deepspeed"


def test_ninja_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, "ninja")
    answer = deepspeed()
    assert not answer.ok
    assert answer.reason == (
        "DeepSpeed compiles its extensions when they are first used, and ninja is not here"
    )
    assert answer.hint == "pip install ninja"


def test_a_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    _without(monkeypatch, "c++")
    answer = deepspeed()
    assert answer.reason.endswith("and a C++ compiler (c++) is not here")
    assert "apt install g++" in answer.hint


def test_the_compiler_that_was_named_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert deepspeed().reason.endswith("and the compiler CXX='no-such-compiler' is not here")


WITHOUT = "DeepSpeed compiles its extensions when they are first used, and "
NO_COMPILER = (
    f"{WITHOUT}a C++ compiler (c++) is not here",
    "install one (apt install g++), or name it in the environment variable CXX",
)
NO_NINJA = (f"{WITHOUT}ninja is not here", "pip install ninja")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A search path on which there is no compiler."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(params=[NO_COMPILER, NO_NINJA], ids=["no compiler", "no ninja"])
def without(
    request: pytest.FixtureRequest, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str, Command]:
    """What is told, what to do, and Python where one of the two is really not there.

    A second environment without ninja would take minutes to install; this one's packages are
    linked to, but for one.
    """
    reason, hint = request.param
    options = []
    if hint == NO_NINJA[1]:
        options = ["-S"]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(_all_but("ninja", bare / "packages")))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *options, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    return reason, hint, run


def _all_but(name: str, folder: Path) -> list[str]:
    """Folders from which all that is installed can be imported, but for one package."""
    folder.mkdir()
    paths = []
    for each in map(Path, sys.path):
        if each.name != "site-packages":
            paths.append(str(each))
            continue
        for package in each.iterdir():
            if re.split(r"\W", package.name)[0] != name:
                (folder / package.name).symlink_to(package)
    return [str(folder), *paths]


def test_a_list_of_plugins_says_it(without: tuple[str, str, Command]) -> None:
    reason, hint, run = without
    done = run("-m", "torchweft", "plugins", "--json")
    (row,) = [
        row
        for row in json.loads(done.stdout)["rows"]
        if (row["kind"], row["name"]) == ("strategy", "deepspeed")
    ]
    assert (row["available"], row["reason"], row["hint"]) == (False, reason, hint)


def test_a_plan_is_refused(without: tuple[str, str, Command]) -> None:
    reason, hint, run = without
    for name in ("deepspeed", "deepspeed_stage_3_offload"):
        done = run(
            "-m", "torchweft", "plan", "--accelerator=cpu", "--devices=2", "--strategy", name
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{reason}; {hint}; what can be used: " in done.stderr


def test_doctor_says_it_beforehand(without: tuple[str, str, Command]) -> None:
    reason, hint, run = without
    done = run("-m", "torchweft", "doctor", "--json")
    found = [f for f in json.loads(done.stdout)["findings"] if "'deepspeed'" in f["message"]]
    version = importlib.metadata.version("torchweft-deepspeed")
    assert found == [
        {
            "broken": False,
            "message": f"strategy 'deepspeed' (torchweft-deepspeed {version}) cannot be used "
            f"here: {reason}",
            "hint": hint,
        }
    ]
    assert done.returncode == 0


def test_it_is_refused_before_anything_starts(without: tuple[str, str, Command]) -> None:
    reason, hint, run = without
    for more in ("strategy='deepspeed_stage_2'", "strategy='deepspeed', precision='bf16-mixed'"):
        code = f"from torchweft import Fabric; Fabric(accelerator='cpu', devices=2, {more})"
        done = run("-c", code)
        (told,) = [line for line in done.stderr.splitlines() if "NotAvailable: " in line]
        assert f"{reason}; {hint}; what can be used: " in told


def test_an_environment_need_not_be_activated(tmp_path: Path) -> None:
    """torch looks for the program ninja, and the package is enough."""
    (tmp_path / "c++").symlink_to(shutil.which("c++") or "/usr/bin/c++")
    code = "from torchweft_deepspeed import library; library.load('cpu'); import shutil; "
    code += "print(shutil.which('ninja'))"
    environ = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert Path(done.stdout.splitlines()[-1]).name == "ninja"
