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
    """A spec and who provides it.

    Attributes:
        spec: what was declared.
        provider: ``"distribution version"``, or whatever names who made it.
        plugin: the name that ``TORCHWEFT_DISABLE_PLUGINS`` takes; empty for a user's own object.
    """

    spec: Spec
    provider: str
    plugin: str = ""

    def describe(self) -> str:
        """``"'name' (provider)"``."""
        return f"'{self.spec.name}' ({self.provider})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of ``torchweft plugins``.

    Attributes:
        kind: ``"accelerator"``, ``"strategy"``, ``"precision"`` or ``"launcher"``.
        name: what the user writes.
        aliases: what may be written instead, presets included.
        provider: ``"distribution version"``.
        summary: one line about it.
        available: whether it can be used on this machine.
        reason: why not.
        hint: what to do about it.
        clash: who else declares one of its names for the same case; empty when nobody does.
    """

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
        declared: the plugins, also those that failed or are disabled.
    """

    def __init__(self, declared: Iterable[Declared]) -> None:
        self.declared = tuple(declared)
        entries: dict[str, list[Entry]] = {kind: [] for kind in KINDS}
        for plugin in self.declared:
            for spec in plugin.specs:
                entries[spec.kind].append(
                    Entry(spec=spec, provider=plugin.provider, plugin=plugin.plugin)
                )
        self._entries = {
            kind: tuple(sorted(found, key=lambda e: (e.spec.name, e.provider, e.plugin)))
            for kind, found in entries.items()
        }

    @property
    def broken(self) -> tuple[Declared, ...]:
        """Plugins that are installed and could not be loaded."""
        return tuple(plugin for plugin in self.declared if plugin.error)

    def entries(self, kind: str) -> tuple[Entry, ...]:
        """Every entry of a kind, in an order that does not depend on that of installation."""
        return self._entries[kind]

    def named(self, kind: str, name: str) -> tuple[Entry, ...]:
        """The entries that answer to ``name``; several when they serve different cases."""
        return tuple(entry for entry in self.entries(kind) if name in entry.spec.names())

    def names(self, kind: str) -> tuple[str, ...]:
        """The words that may be written for a kind, aliases and presets included, sorted."""
        return tuple(sorted({n for entry in self.entries(kind) for n in entry.spec.names()}))

    def clash(self, kind: str, name: str) -> tuple[Entry, Entry] | None:
        """Two entries between which nothing decides when ``name`` is asked for."""
        entries = self.named(kind, name)
        pairs = ((a, b) for i, a in enumerate(entries) for b in entries[i + 1 :])
        return next((pair for pair in pairs if _undecided(*pair)), None)

    def rows(self) -> list[Row]:
        """Every spec with its availability here, by kind and name. Runs the probes."""
        return [self._row(entry) for kind in KINDS for entry in self.entries(kind)]

    def _row(self, entry: Entry) -> Row:
        spec = entry.spec
        availability = probe(entry)
        return Row(
            kind=spec.kind,
            name=spec.name,
            aliases=spec.names()[1:],
            provider=entry.provider,
            summary=spec.summary,
            available=availability.ok,
            reason=availability.reason,
            hint=availability.hint,
            clash="; ".join(
                f"'{name}' is also declared by {other.provider}"
                for name in spec.names()
                for other in self.named(spec.kind, name)
                if other is not entry and _undecided(entry, other)
            ),
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
    except (Exception, SystemExit) as error:
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


def _undecided(a: Entry, b: Entry) -> bool:
    return not (narrower(a.spec, b.spec) or narrower(b.spec, a.spec) or disjoint(a.spec, b.spec))


def _subset(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Empty means everything."""
    return not b or (bool(a) and set(a) <= set(b))
