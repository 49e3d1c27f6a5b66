"""What the tests of one plugin share: what is installed, and how the plugin behaves on trial."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from torchweft.catalog import Catalog, Entry
from torchweft.discovery import Found, discover
from torchweft.errors import BrokenPlugin
from torchweft.manager import Declared, Manager
from torchweft.specs import KINDS, Preset, StrategySpec, load_target
from torchweft.testing.constructor import needed
from torchweft.testing.interpreter import fresh_interpreter
from torchweft.testing.trial import Report

__all__ = ["Parameter", "PluginKit", "kit_of", "parameters_of"]


class PluginKit:
    """What the tests of one plugin share: what is installed, and how it behaves on trial."""

    def __init__(self, name: str, installed: list[Found], manager: Manager) -> None:
        self.name = name
        self.names = sorted({found.name for found in installed})
        self.catalog = Catalog(manager.declared)
        self.found = [found for found in installed if found.name == name]
        mine = [declared for declared in manager.declared if declared.plugin == name]
        #: None unless exactly one is installed.
        self.declared = mine[0] if len(mine) == 1 else None
        self.entries = tuple(
            entry
            for kind in KINDS
            for entry in self.catalog.entries(kind)
            if self.declared is not None and entry.plugin == name
        )
        modules = [found.module for found in self.found if found.module is not None]
        self.hooks = {hook for module in modules for hook in manager.implemented(module)}

    # -- what there is to ask ----------------------------------------------------------------------

    def targets(self, field: str) -> dict[str, Entry]:
        """The targets of one field of all specs, each with a spec that names it."""
        named = ((entry.spec.targets().get(field), entry) for entry in self.entries)
        return {target: entry for target, entry in named if target is not None}

    @property
    def presets(self) -> list[tuple[Entry, Preset]]:
        """The presets of all strategies."""
        return [(entry, preset) for entry, spec in self._strategies() for preset in spec.presets]

    @property
    def preloads(self) -> list[tuple[Entry, str]]:
        """The modules that strategies want imported before ranks are forked."""
        return [(entry, module) for entry, spec in self._strategies() for module in spec.preload]

    def _strategies(self) -> Iterator[tuple[Entry, StrategySpec]]:
        for entry in self.entries:
            if isinstance(entry.spec, StrategySpec):
                yield entry, entry.spec

    def loaded(self) -> Declared:
        """What it declares; skips where it could not be loaded, which is one test's to say."""
        if self.declared is None or self.declared.error:
            pytest.skip(f"plugin '{self.name}' could not be loaded")
        return self.declared

    # -- on trial ----------------------------------------------------------------------------------

    @property
    def without_torch(self) -> Report:
        """Its hooks, probes and detections in an interpreter without torch."""
        return _whole(self._without_torch)

    @property
    def with_torch(self) -> Report:
        """The same after torch was imported, its constructors, and a run of one process."""
        return _whole(self._with_torch)

    @cached_property
    def _without_torch(self) -> Report:
        found = self.found[0]
        assert found.module is not None
        fields = {"name": found.name, "distribution": found.distribution, "version": found.version}
        probes, detections = list(self.targets("probe")), list(self.targets("detect"))
        return _try("without_torch", fields, found.module.__name__, probes, detections)

    @cached_property
    def _with_torch(self) -> Report:
        targets = list(self.targets("target"))
        return _try(
            "with_torch",
            self.name,
            list(self.targets("probe")),
            list(self.targets("detect")),
            targets,
            [target for target in targets if not _needs_options(target)],
            [module for _, module in self.preloads],
        )


def _try(function: str, *arguments: Any) -> Report:
    """Run a function of ``torchweft.testing.trial`` in a fresh interpreter."""
    ours = {name: None for name in os.environ if name.startswith("TORCHWEFT_")}
    with tempfile.TemporaryDirectory(prefix="torchweft-trial-") as folder:
        path = Path(folder) / "report"
        given = ", ".join(map(repr, (str(path), *arguments)))
        code = f"from torchweft.testing.trial import {function}\n{function}({given})"
        try:
            # What a plugin's libraries are warned of is no fault of the plugin.
            done = fresh_interpreter(code, environ={**ours, "PYTHONWARNINGS": None})
        except TimeoutError as error:
            return Report(ended=str(error))
        if not path.exists():
            return Report(ended=f"it ended early, status {done.status}\n{done.out}{done.err}")
        report: Report = pickle.loads(path.read_bytes())
    return report


def _whole(report: Report) -> Report:
    if report.ended:
        pytest.fail(f"this plugin was tried in an interpreter: {report.ended}", pytrace=False)
    return report


def _needs_options(target: str) -> bool:
    try:
        return bool(needed(load_target(target, "")))
    except (BrokenPlugin, TypeError, ValueError):
        return True


@dataclass(frozen=True, slots=True)
class Parameter:
    """One thing for a test to be about, by what a report calls it."""

    label: str
    value: Any


def parameters_of(kit: PluginKit) -> Mapping[str, list[Parameter]]:
    """By argument of a test, what it is to be called with."""

    def of(entry: Entry) -> str:
        return f"{entry.spec.kind}-{entry.spec.name}"

    return {
        "declared_entry": [Parameter(of(entry), entry) for entry in kit.entries],
        "probed_entry": [Parameter(of(each), each) for each in kit.entries if each.spec.probe],
        "probe_target": [Parameter(t, (e, t)) for t, e in kit.targets("probe").items()],
        "detect_target": [Parameter(t, (e, t)) for t, e in kit.targets("detect").items()],
        "preset": [Parameter(preset.alias, (entry, preset)) for entry, preset in kit.presets],
        "preload": [Parameter(module, (entry, module)) for entry, module in kit.preloads],
    }


_INSTALLED = pytest.StashKey[tuple[list[Found], Manager]]()
_KITS = pytest.StashKey[dict[str, PluginKit]]()


def kit_of(config: pytest.Config, plugin: str) -> PluginKit:
    """The kit of one plugin, which lives as long as the test session."""
    if _INSTALLED not in config.stash:
        installed, manager = discover(), Manager({})
        for found in installed:
            manager.add(found)
        config.stash[_INSTALLED] = installed, manager
    kits = config.stash.setdefault(_KITS, {})
    if plugin not in kits:
        kits[plugin] = PluginKit(plugin, *config.stash[_INSTALLED])
    return kits[plugin]
