"""What users and plugin authors import: all of it is there, listed and described."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import importlib_metadata
import pytest

import torchweft

PUBLIC = [
    "torchweft",
    "torchweft.api",
    "torchweft.specs",
    "torchweft.errors",
    "torchweft.hookspecs",
    "torchweft.launching",
    "torchweft.testing",
]


def described(value: Any) -> bool:
    """Whether somebody wrote a docstring; dataclasses make one up from their fields."""
    text = inspect.getdoc(value) or ""
    return bool(text) and not text.startswith(f"{getattr(value, '__name__', '')}(")


@pytest.mark.parametrize("module", PUBLIC)
def test_every_listed_name_is_there_once(module: str) -> None:
    loaded = importlib.import_module(module)
    assert len(set(loaded.__all__)) == len(loaded.__all__)
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None


@pytest.mark.parametrize("module", PUBLIC)
def test_every_class_and_function_without_an_underscore_is_listed(module: str) -> None:
    loaded = importlib.import_module(module)
    own = {
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module
    }
    assert own <= set(loaded.__all__)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_described(module: str) -> None:
    loaded = importlib.import_module(module)
    values = {name: getattr(loaded, name) for name in loaded.__all__}
    # A constant is described by the comment beside it.
    constants = str | tuple | Mapping
    bare = [n for n, v in values.items() if not isinstance(v, constants) and not described(v)]
    assert bare == []


@pytest.mark.parametrize("module", PUBLIC)
def test_every_method_of_a_public_class_is_described(module: str) -> None:
    loaded = importlib.import_module(module)
    bare = [
        f"{name}.{method}"
        for name in loaded.__all__
        if inspect.isclass(getattr(loaded, name))
        for method, member in vars(getattr(loaded, name)).items()
        if not method.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property | classmethod))
        and not described(member)
    ]
    assert bare == []


def test_the_package_shows_what_it_lists() -> None:
    assert dir(torchweft) == sorted(torchweft.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"^module 'torchweft' has no attribute 'Farbic'$"):
        torchweft.Farbic  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    assert torchweft.__version__ == importlib_metadata.version("torchweft")


def test_the_package_is_typed() -> None:
    from importlib.resources import files

    assert (files("torchweft") / "py.typed").is_file()


def test_a_docstring_that_a_dataclass_made_up_describes_nothing() -> None:
    @dataclass
    class Bare:
        field: int

    assert not described(Bare)
    assert described(torchweft.TorchweftError)
