"""The hook file is the manual: each hook says when it is called, by whom, and what to return."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from torchweft import hookspecs

HOOKS = {
    name: value
    for name, value in vars(hookspecs).items()
    if getattr(value, f"{hookspecs.NAME}_spec", None) is not None
}
TESTED_IN = [
    Path(__file__).parents[1] / "core" / name for name in ("test_hookspecs.py", "test_manager.py")
]


def test_there_are_hooks_and_all_are_public() -> None:
    assert set(HOOKS) == {
        "torchweft_accelerators",
        "torchweft_strategies",
        "torchweft_precisions",
        "torchweft_launchers",
        "torchweft_check_plan",
        "torchweft_worker_context",
    }
    assert set(HOOKS) <= set(hookspecs.__all__)


@pytest.mark.parametrize("name", HOOKS)
def test_the_first_line_fits_a_table_row(name: str) -> None:
    first, blank, *_ = (inspect.getdoc(HOOKS[name]) or "").splitlines()
    assert 0 < len(first) <= 60
    assert first.endswith(".")
    assert blank == ""


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_says_when_and_by_whom_it_is_called(name: str) -> None:
    text = " ".join((inspect.getdoc(HOOKS[name]) or "").split())
    callers = ("by the plugin manager", "by the resolution", "by the worker")
    assert any(f"Called {caller}, once" in text for caller in callers)
    assert any(f" {word} " in text for word in ("when", "after", "before"))
    assert "process" in text


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_says_what_to_return_what_happens_to_several_and_what_is_nothing(
    name: str,
) -> None:
    _, returns, promise = (inspect.getdoc(HOOKS[name]) or "").partition("\nReturns:\n")
    assert returns
    assert "all plugins" in promise
    assert "empty list" in promise or "nullcontext()" in promise


@pytest.mark.parametrize("name", HOOKS)
def test_every_argument_is_documented_and_every_hook_is_typed(name: str) -> None:
    signature = inspect.signature(HOOKS[name])
    text = inspect.getdoc(HOOKS[name]) or ""
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty
        assert f"\n    {parameter.name}: " in text


TESTS = [
    node.name
    for path in TESTED_IN
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_test_named_after_it(name: str) -> None:
    assert [test for test in TESTS if test.startswith(f"test_{name}_")] != []
