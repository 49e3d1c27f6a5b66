"""Whether DeepSpeed can be used here, without importing it."""

from __future__ import annotations

import importlib.util
import shutil
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
