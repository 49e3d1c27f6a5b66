"""Whether DeepSpeed can be used here, without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchweft import Fabric
from torchweft.errors import NotAvailable
from torchweft_deepspeed.probe import deepspeed


def _without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    spec, which = importlib.util.find_spec, shutil.which

    def found(name: str, *args: Any) -> Any:
        return None if name in names else spec(name, *args)

    def there(name: str, *args: Any) -> Any:
        return None if name in names else which(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(shutil, "which", there)


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


NO_COMPILER = (
    "DeepSpeed compiles its extensions when they are first used, and a C++ compiler (c++) is not "
    "here"
)
INSTALL = "install one (apt install g++), or name it in the environment variable CXX"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A search path on which there is no compiler."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def test_doctor_says_it_beforehand(bare: Path) -> None:
    command = [sys.executable, "-m", "torchweft", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    found = [f for f in json.loads(done.stdout)["findings"] if "'deepspeed'" in f["message"]]
    version = importlib.metadata.version("torchweft-deepspeed")
    assert found == [
        {
            "broken": False,
            "message": f"strategy 'deepspeed' (torchweft-deepspeed {version}) cannot be used "
            f"here: {NO_COMPILER}",
            "hint": INSTALL,
        }
    ]
    assert done.returncode == 0


def test_it_is_refused_before_anything_starts(bare: Path) -> None:
    with pytest.raises(NotAvailable) as error:
        Fabric(accelerator="cpu", devices=2, strategy="deepspeed_stage_2")
    assert f"{NO_COMPILER}; {INSTALL}" in str(error.value)
    with pytest.raises(NotAvailable, match=r"c\+\+\) is not here"):
        Fabric(accelerator="cpu", devices=2, strategy="deepspeed", precision="bf16-mixed")


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
