"""``docs/plugins``: what is generated there is what the source says now."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.contract.reference import COMMAND, PAGES, PART, rewritten

from torchweft import api, hookspecs, specs

HOOKS = [name for name in hookspecs.__all__ if name.startswith("torchweft_")]
REFERENCE = next(page for page in PAGES if page.name == "hooks.md").read_text(encoding="utf-8")
PARTS = {(part["sort"], part["name"]): part["text"] for part in PART.finditer(REFERENCE)}

BASES = ("Accelerator", "Strategy", "Precision", "Launcher")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_generated_parts_are_up_to_date(page: Path) -> None:
    written = page.read_text(encoding="utf-8")
    assert rewritten(written) == written, f"{page.name} is out of date; run: {COMMAND}"


def test_every_hook_spec_and_base_class_has_its_part() -> None:
    records = [
        name for name, value in vars(specs).items() if hasattr(value, "__dataclass_fields__")
    ]
    assert {name for sort, name in PARTS if sort == "hook"} == set(HOOKS)
    assert {name for sort, name in PARTS if sort == "spec"} == set(records)
    assert {name for sort, name in PARTS if sort == "members"} >= set(BASES)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_stands_there_with_the_signature_that_it_has(name: str) -> None:
    """By another way than the page is written: the live function rather than its source."""
    live = inspect.signature(getattr(hookspecs, name))
    assert f"def {name}{str(live).replace(chr(39), '')}: ..." in PARTS["hook", name]


@pytest.mark.parametrize("name", [name for sort, name in PARTS if sort == "spec"])
def test_every_field_of_a_spec_has_a_meaning(name: str) -> None:
    cls: Any = getattr(specs, name)
    own = {field.name for field in fields(cls)}
    if cls is not specs.Spec and issubclass(cls, specs.Spec):
        own -= {field.name for field in fields(specs.Spec)}
    rows = [line.split(" | ") for line in PARTS["spec", name].splitlines() if "`" in line[:3]]
    assert {row[0].strip("| `") for row in rows} == own
    assert all(len(row) == 4 and len(row[3]) > len(" |") for row in rows)


@pytest.mark.parametrize("name", BASES)
def test_every_member_of_a_base_class_is_there(name: str) -> None:
    cls = getattr(api, name)
    defined = {*vars(cls), *cls.__annotations__}
    lines = PARTS["members", name].splitlines()
    shown = {line[3:].split("(")[0].split(":")[0] for line in lines if line.startswith("- `")}
    assert shown == {member for member in defined if not member.startswith("_")}
    assert {line[3:].split("(")[0] for line in lines if "` (abstract)" in line} == set(
        getattr(cls, "__abstractmethods__", ())
    )


def test_a_part_that_was_changed_is_noticed() -> None:
    changed = REFERENCE.replace("Object to a plan.", "Object to a plane.")
    assert changed != REFERENCE
    assert rewritten(changed) == REFERENCE
