"""What a conformance class is about: the spec that its name stands for, and whether it is here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from torchweft.catalog import Catalog, Entry, probe
from torchweft.errors import TorchweftError, did_you_mean
from torchweft.manager import Manager
from torchweft.missing import unknown_name
from torchweft.request import parse_name
from torchweft.specs import load_target

__all__ = ["Subject", "check_attributes", "find"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is tested.

    Attributes:
        kind: of spec.
        asked: what the class attribute says, a name and perhaps options.
        entry: the spec, and who provides it.
        options: those behind the name.
        count: its devices on this node; None where there is no limit.
    """

    kind: str
    asked: str
    entry: Entry
    options: Mapping[str, Any] = field(default_factory=dict)
    count: int | None = None

    @property
    def spec(self) -> Any:
        """The spec."""
        return self.entry.spec

    @property
    def title(self) -> str:
        """What to call it in a sentence."""
        return f"{self.kind} '{self.asked}'"

    def load(self) -> Any:
        """The class that the spec's target names."""
        return load_target(self.entry.spec.target, self.entry.provider)


def check_attributes(cls: type) -> None:
    """Fail where an attribute of a test class is nearly one of the kit's: it would do nothing."""
    kit = next(each for each in cls.__mro__ if each.__module__.startswith("torchweft.testing."))
    known = [name for name in dir(kit) if not name.startswith(("_", "test_", "pytest_"))]
    for name, value in vars(cls).items():
        if name.startswith(("_", "test_")) or name in known or callable(value):
            continue
        near = did_you_mean(name, known)
        if near:
            pytest.fail(
                f"{cls.__name__} has an attribute '{name}', which {kit.__name__} does not know"
                f"{near} it knows {', '.join(known)}",
                pytrace=False,
            )


def find(cls: type, kind: str, device: str = "") -> Subject:
    """What the attribute ``kind`` of a conformance class names.

    Fails the test where it names nothing that is known, and skips it where it cannot be used
    here, with the probe's reason and hint. ``device``: torch's word for the devices that it is
    wanted for, where specs share a name, of which the class's ``strategy`` chooses further.
    """
    check_attributes(cls)
    asked = getattr(cls, kind, "")
    if not isinstance(asked, str) or not asked:
        pytest.fail(
            f"{cls.__name__} does not say what it tests; write {kind} = 'NAME' in it, the name "
            f"under which a plugin declares the {kind}",
            pytrace=False,
        )
    try:
        name, options = parse_name(kind, asked)
    except TorchweftError as error:
        pytest.fail(f"{cls.__name__}: {error}", pytrace=False)
    catalog = Catalog(Manager.from_entry_points(os.environ).declared)
    entries = catalog.named(kind, name or "")
    if not entries:
        unknown = unknown_name(kind, name or "auto", catalog)
        pytest.fail(f"{cls.__name__}: {unknown}", pytrace=False)
    # Where none serves the device, the plan says so in better words.
    fitting = [entry for entry in entries if _serves(entry, device)] or entries
    if kind != "strategy":
        names = _strategies(catalog, getattr(cls, "strategy", "auto"))
        fitting = [entry for entry in fitting if _goes_with(entry, names)] or fitting
    answers = [(entry, probe(entry)) for entry in fitting]
    usable = [(entry, answer) for entry, answer in answers if answer.ok]
    if not usable:
        said = "; ".join(f"{answer.reason}; {answer.hint}" for _, answer in answers)
        pytest.skip(f"{kind} '{name}' cannot be used here: {said}")
    # What serves fewer devices wins, as it does in a plan.
    entry, answer = min(usable, key=lambda pair: (pair[0].spec.name != name, _breadth(pair[0])))
    return Subject(kind=kind, asked=asked, entry=entry, options=options, count=answer.count)


def _serves(entry: Entry, device: str) -> bool:
    return not device or not entry.spec.devices or device in entry.spec.devices


def _strategies(catalog: Catalog, asked: Any) -> set[str]:
    """The names of the strategies that a class may mean; none where it leaves that open."""
    if not isinstance(asked, str) or asked == "auto":
        return set()
    name, _ = parse_name("strategy", asked)
    return {entry.spec.name for entry in catalog.named("strategy", name or "")}


def _goes_with(entry: Entry, names: set[str]) -> bool:
    served = set(getattr(entry.spec, "strategies", ()))
    return not served or bool(served & names)


def _breadth(entry: Entry) -> tuple[float, float]:
    served = getattr(entry.spec, "strategies", ())
    return len(served) or float("inf"), len(entry.spec.devices) or float("inf")
