"""Specs by kind and name: aliases, collisions, and the rows of a listing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torchweft.errors import BrokenPlugin
from torchweft.manager import Declared
from torchweft.specs import KINDS, Availability, Spec, load_target

__all__ = ["Catalog", "Entry", "Row", "disjoint", "narrower", "probe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A spec and who provides it."""

    spec: Spec
    provider: str

    def describe(self) -> str:
        """``"'name' (provider)"``."""
        return f"'{self.spec.name}' ({self.provider})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of ``torchweft plugins``."""

    kind: str
    name: str
    aliases: tuple[str, ...]
    provider: str
    summary: str
    available: bool
    reason: str = ""
    hint: str = ""
    clash: str = ""


class Catalog:
    """Everything that the installed plugins declare.

    Attributes:
        declared: the plugins, also those that failed.
    """

    def __init__(self, declared: Iterable[Declared]) -> None:
        self.declared = tuple(declared)
        self._entries: dict[str, list[Entry]] = {kind: [] for kind in KINDS}
        for plugin in self.declared:
            for spec in plugin.specs:
                self._entries[spec.kind].append(Entry(spec=spec, provider=plugin.provider))

    @property
    def broken(self) -> tuple[Declared, ...]:
        """Plugins that are installed and could not be loaded."""
        return tuple(plugin for plugin in self.declared if plugin.error)

    def entries(self, kind: str) -> tuple[Entry, ...]:
        """Every entry of a kind, in a fixed order."""
        return tuple(sorted(self._entries[kind], key=lambda e: (e.spec.name, e.provider)))

    def named(self, kind: str, name: str) -> tuple[Entry, ...]:
        """The entries that answer to ``name``; several when they serve different cases."""
        return tuple(entry for entry in self.entries(kind) if name in entry.spec.names())

    def names(self, kind: str) -> tuple[str, ...]:
        """The words that may be written for a kind, aliases and presets included, sorted."""
        return tuple(sorted({n for entry in self._entries[kind] for n in entry.spec.names()}))

    def clash(self, kind: str, name: str) -> tuple[Entry, Entry] | None:
        """Two entries between which nothing decides when ``name`` is asked for."""
        entries = self.named(kind, name)
        for i, first in enumerate(entries):
            for second in entries[i + 1 :]:
                a, b = first.spec, second.spec
                if not (narrower(a, b) or narrower(b, a) or disjoint(a, b)):
                    return first, second
        return None

    def rows(self) -> list[Row]:
        """Every spec with its availability here, by kind and name. Runs the probes."""
        return [self._row(entry) for kind in KINDS for entry in self.entries(kind)]

    def _row(self, entry: Entry) -> Row:
        spec = entry.spec
        availability = probe(entry)
        clashes = []
        for name in spec.names():
            pair = self.clash(spec.kind, name)
            if pair is not None and entry in pair:
                other = pair[1] if pair[0] is entry else pair[0]
                clashes.append(f"'{name}' is also declared by {other.provider}")
        return Row(
            kind=spec.kind,
            name=spec.name,
            aliases=spec.names()[1:],
            provider=entry.provider,
            summary=spec.summary,
            available=availability.ok,
            reason=availability.reason,
            hint=availability.hint,
            clash="; ".join(clashes),
        )


def probe(entry: Entry) -> Availability:
    """Ask a spec's probe. A probe that fails is an answer too, with its error as the reason."""
    if not entry.spec.probe:
        return Availability(ok=True)
    try:
        function = load_target(entry.spec.probe, entry.provider)
        answer: Any = function()
        if not isinstance(answer, Availability):
            raise BrokenPlugin(f"it returned {answer!r} instead of an Availability")
    except Exception as error:
        return Availability(
            ok=False,
            reason=f"the probe '{entry.spec.probe}' of {entry.provider} failed: "
            f"{type(error).__name__}: {error}",
            hint=f"report this to the authors of {entry.provider}",
        )
    return answer


def narrower(a: Spec, b: Spec) -> bool:
    """Whether ``a`` serves strictly less than ``b``, so that it wins where both apply."""
    axes = [(a.served_devices(), b.served_devices()), (a.strategies, b.strategies)]
    return all(_subset(x, y) for x, y in axes) and any(set(x) != set(y) for x, y in axes)


def disjoint(a: Spec, b: Spec) -> bool:
    """Whether no case exists in which both serve."""
    axes = [(a.served_devices(), b.served_devices()), (a.strategies, b.strategies)]
    return any(x and y and not set(x) & set(y) for x, y in axes)


def _subset(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Empty means everything."""
    return not b or (bool(a) and set(a) <= set(b))
