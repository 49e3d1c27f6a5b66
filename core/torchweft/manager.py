"""The pluggy manager: plugins are registered one by one, checked, and asked for their specs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from torchweft import hookspecs
from torchweft.discovery import Found, discover
from torchweft.errors import BrokenPlugin, InvalidRequest
from torchweft.specs import (
    AcceleratorSpec,
    LauncherSpec,
    PrecisionSpec,
    Spec,
    StrategySpec,
)

if TYPE_CHECKING:
    from torchweft.plan import RunPlan

__all__ = ["Declared", "Manager"]

_DECLARING: Mapping[str, type[Spec]] = {
    "torchweft_accelerators": AcceleratorSpec,
    "torchweft_strategies": StrategySpec,
    "torchweft_precisions": PrecisionSpec,
    "torchweft_launchers": LauncherSpec,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What one plugin declares, or why it cannot be used."""

    plugin: str
    distribution: str
    version: str
    specs: tuple[Spec, ...] = ()
    error: str = ""

    @property
    def provider(self) -> str:
        """``"distribution version"``, as messages name it."""
        return f"{self.distribution} {self.version}".strip()


class Manager:
    """The plugins of one ``Fabric`` or one command. Never shared, never global.

    ``environ`` is read for ``TORCHWEFT_DISABLE_PLUGINS`` (names separated by commas) and
    ``TORCHWEFT_TRACE`` (``1`` prints every hook call to stderr).
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.NAME)
        self._pluggy.add_hookspecs(hookspecs)
        self.declared: list[Declared] = []
        disabled = environ.get("TORCHWEFT_DISABLE_PLUGINS", "")
        self._blocked = frozenset(name.strip() for name in disabled.split(",") if name.strip())
        for name in self._blocked:
            self._pluggy.set_blocked(name)
        if _flag(environ, "TORCHWEFT_TRACE"):
            self._pluggy.trace.root.setwriter(sys.stderr.write)
            self._pluggy.enable_tracing()

    @classmethod
    def from_entry_points(cls, environ: Mapping[str, str]) -> Manager:
        """A manager with every installed plugin that is not disabled."""
        manager = cls(environ)
        for found in discover(blocked=manager._blocked):
            manager.add(found)
        return manager

    def add(self, found: Found) -> Declared:
        """Register one plugin and collect its specs. A failure is recorded, not raised."""
        error, specs = found.error, ()
        if found.module is not None:
            error, specs = self._collect(found.module, found.name, found.provider)
        declared = Declared(
            plugin=found.name,
            distribution=found.distribution,
            version=found.version,
            specs=specs,
            error=error,
        )
        self.declared.append(declared)
        return declared

    def add_module(self, module: ModuleType) -> Declared:
        """Register a module of hooks that the user handed over. Raises ``BrokenPlugin``."""
        found = Found(
            name=module.__name__,
            distribution=f"the module '{module.__name__}'",
            version="",
            module=module,
        )
        declared = self.add(found)
        if declared.error:
            raise BrokenPlugin(f"{found.provider} given in plugins= cannot be used: "
                               f"{declared.error}")
        return declared

    def _collect(
        self, module: ModuleType, name: str, provider: str
    ) -> tuple[str, tuple[Spec, ...]]:
        try:
            if self._pluggy.register(module, name=name) is None:
                return "", ()  # blocked
            # A misspelt hook is an error and not a plugin that silently does nothing.
            self._pluggy.check_pending()
            return "", tuple(self._specs(module, provider))
        except Exception as error:
            if self._pluggy.is_registered(module):
                self._pluggy.unregister(module)
            return f"{type(error).__name__}: {error}", ()

    def _specs(self, module: ModuleType, provider: str) -> Iterable[Spec]:
        others = [plugin for plugin in self._pluggy.get_plugins() if plugin is not module]
        for hook, kind in _DECLARING.items():
            if not hasattr(module, hook):
                continue
            caller: Callable[[], list[Any]] = self._pluggy.subset_hook_caller(hook, others)
            results = caller()
            # pluggy drops None, so a hook that forgot its return statement has no result at all.
            if not results:
                raise BrokenPlugin(f"{hook}() of {provider} returned None; return a list of "
                                   f"{kind.__name__}, which may be empty")
            for spec in results[0]:
                if not isinstance(spec, kind):
                    raise BrokenPlugin(
                        f"{hook}() of {provider} returned {spec!r}; "
                        f"each element must be a {kind.__name__}"
                    )
                yield spec

    def objections(self, plan: RunPlan) -> list[str]:
        """What all plugins have to say against a plan."""
        answers: list[Iterable[str] | str] = self._pluggy.hook.torchweft_check_plan(plan=plan)
        # A lone string is a natural slip for one objection; its letters are not objections.
        return [
            sentence
            for answer in answers
            for sentence in ([answer] if isinstance(answer, str) else answer)
        ]

    def worker_contexts(self, run: Any) -> list[Any]:
        """The context managers that plugins want around user code in this rank."""
        return list(self._pluggy.hook.torchweft_worker_context(run=run))


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise InvalidRequest(f"the environment variable {name} is '{value}'; it takes 1 or 0")
    return value == "1"
