"""``api.txt``: nothing public changes without being seen."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from tests.contract.api import MODULES, SNAPSHOT, difference, snapshot
from tests.contract.signatures import CORE, definition, listed

import torchweft

ROOT = CORE.parent
PAGE = (ROOT / "docs" / "plugins" / "compatibility.md").read_text(encoding="utf-8")


def test_the_snapshot_is_up_to_date() -> None:
    told = difference(SNAPSHOT.read_text(encoding="utf-8"), snapshot())
    assert not told, f"\n{told}"


def test_a_change_is_told_with_the_way_out() -> None:
    now = snapshot()
    before = now.replace("torchweft_check_plan(plan: RunPlan)", "torchweft_check_plan(plan: Plan)")
    assert before != now
    lines = difference(before, now).splitlines()
    assert "-def torchweft_check_plan(plan: Plan) -> Iterable[str]" in lines
    assert "+def torchweft_check_plan(plan: RunPlan) -> Iterable[str]" in lines
    assert "    python -m tests.contract.api" in lines
    assert any("add a line to CHANGELOG.md" in line for line in lines)
    assert difference(now, now) == ""


# -- by another way than it is written: live objects rather than their source --------------------


@pytest.mark.parametrize("module", MODULES)
def test_it_has_every_name_that_a_module_lists(module: str) -> None:
    assert importlib.import_module(module).__all__ == listed(module)


def public(module: str) -> list[tuple[str, Any]]:
    loaded = importlib.import_module(module)
    return [(name, getattr(loaded, name)) for name in listed(module)]


@pytest.mark.parametrize("module", MODULES)
def test_what_is_spelled_has_the_parameters_of_what_is_there(module: str) -> None:
    for name, value in public(module):
        found = definition(module, name)
        if inspect.isfunction(value):
            assert parameters(found.spelled) == list(inspect.signature(value).parameters), name
        if not found.is_class:
            continue
        members = {member.name: member for member in found.members()}
        for own, attribute in vars(value).items():
            if inspect.isfunction(attribute) and not own.startswith("_"):
                live = list(inspect.signature(attribute).parameters)[1:]
                assert parameters(members[own].spelled) == live, f"{name}.{own}"
        assert {own for own in vars(value) if not own.startswith("_")} <= set(members)


def parameters(spelled: str) -> list[str]:
    """The names in ``"(x: Callable[[int], str] = …, *args: Any, y: int)"``."""
    inside = spelled[spelled.index("(") + 1 :]
    depth, begin, parts = 0, 0, []
    for place, letter in enumerate(inside):
        if (letter == "," and depth == 0) or (letter == ")" and depth == 0):
            parts.append(inside[begin:place].strip())
            begin = place + 1
            if letter == ")":
                break
        depth += {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}.get(letter, 0)
    names = [re.match(r"\**(\w*)", part) for part in parts]
    return [name[1] for name in names if name is not None and name[1]]


# -- what the page says about it -----------------------------------------------------------------


def test_the_page_promises_the_same_modules() -> None:
    promised = re.findall(r"^\| `(torchweft[\w.]*)` \|", PAGE, re.MULTILINE)
    assert sorted(promised) == sorted(MODULES)


def test_a_requirement_of_a_plugin_admits_this_minor_version_and_no_other() -> None:
    """The rule of the page, and whether those follow it who show it."""
    major, minor = Version(torchweft.__version__).release[:2]
    plugins = [f"plugins/{name}/pyproject.toml" for name in ("cuda", "deepspeed", "ray", "xla")]
    others = ("docs/plugins/README.md", "docs/plugins/tutorial.md", *plugins)
    texts = [PAGE, *((ROOT / path).read_text(encoding="utf-8") for path in others)]
    requirements = [
        Requirement(found)
        for text in texts
        for found in re.findall(r'"(torchweft(?:\[\w+\])?[<>=][^"]*)"', text)
    ]
    assert len(requirements) >= len(texts)
    for requirement in requirements:
        assert requirement.specifier.contains(f"{major}.{minor}.0")
        assert requirement.specifier.contains(f"{major}.{minor}.99")
        assert not requirement.specifier.contains(f"{major}.{minor + 1}.0")
