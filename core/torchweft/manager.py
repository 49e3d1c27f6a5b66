"""The pluggy manager: plugins are registered one by one, checked, and asked for their specs."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from torchweft import hookspecs
from torchweft.discovery import Found, discover
from torchweft.errors import BrokenPlugin, InvalidRequest, TorchweftError, did_you_mean
from torchweft.faults import faults
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

_HOOKS = tuple(name for name in hookspecs.__all__ if name.startswith("torchweft_"))

#: What a hook returns that has nothing to give, where that is not an empty list.
_NOTHING = {"torchweft_worker_context": "contextlib.nullcontext()"}

_DISABLE = "TORCHWEFT_DISABLE_PLUGINS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What one plugin declares, or why it cannot be used.

    Attributes:
        plugin: its name; what ``TORCHWEFT_DISABLE_PLUGINS`` takes.
        distribution: that provides it.
        version: of the distribution.
        specs: what it declares; empty when it failed or is disabled.
        error: why it failed.
        trace: the traceback of that error.
        disabled: whether ``TORCHWEFT_DISABLE_PLUGINS`` names it.
    """

    plugin: str
    distribution: str
    version: str
    specs: tuple[Spec, ...] = ()
    error: str = ""
    trace: str = ""
    disabled: bool = False

    @property
    def provider(self) -> str:
        """``"distribution version"``, as messages name it."""
        return f"{self.distribution} {self.version}".strip()

    @property
    def failure(self) -> str:
        """The sentence that says which plugin failed, whose it is, and how."""
        return f"plugin '{self.plugin}' ({self.provider}) failed to load: {self.error}"


class Manager:
    """The plugins of one ``Fabric`` or one command. Never shared, never global.

    ``environ`` is read for ``TORCHWEFT_DISABLE_PLUGINS`` (names separated by commas) and
    ``TORCHWEFT_TRACE`` (``1`` prints every hook call to stderr). Raises ``InvalidRequest`` for a
    value that cannot be used.

    Attributes:
        declared: every plugin that was added, in that order, also those that failed.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.NAME)
        self._pluggy.add_hookspecs(hookspecs)
        self.declared: list[Declared] = []
        self._modules: list[tuple[ModuleType, Found]] = []
        disabled = environ.get(_DISABLE, "")
        self._blocked = frozenset(name.strip() for name in disabled.split(",") if name.strip())
        for name in self._blocked:
            self._pluggy.set_blocked(name)
        if _flag(environ, "TORCHWEFT_TRACE"):
            self._pluggy.trace.root.setwriter(sys.stderr.write)
            self._pluggy.enable_tracing()

    @classmethod
    def from_entry_points(cls, environ: Mapping[str, str]) -> Manager:
        """A manager with every installed plugin that is not disabled.

        Raises ``InvalidRequest`` when ``TORCHWEFT_DISABLE_PLUGINS`` names a plugin that is not
        installed: a misspelt name would leave on what was to be switched off.
        """
        manager = cls(environ)
        found = discover(blocked=manager._blocked)
        installed = sorted({each.name for each in found})
        for name in sorted(manager._blocked.difference(installed)):
            raise InvalidRequest(
                f"the environment variable {_DISABLE} names '{name}', and no plugin that is "
                f"installed is called that{did_you_mean(name, installed) or ';'} installed: "
                f"{', '.join(installed) or 'none'}"
            )
        for each in found:
            manager.add(each)
        return manager

    def add(self, found: Found) -> Declared:
        """Register one plugin and collect its specs. A failure is recorded, not raised."""
        specs: tuple[Spec, ...] = ()
        error, trace = found.error, found.trace
        disabled = found.disabled or self._pluggy.is_blocked(found.name)
        if found.module is not None and not disabled:
            error, trace, specs = self._collect(found.module, found)
        declared = Declared(
            plugin=found.name,
            distribution=found.distribution,
            version=found.version,
            specs=specs,
            error=error,
            trace=trace,
            disabled=disabled,
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
            raise BrokenPlugin(
                f"{found.provider} given in plugins= cannot be used: {declared.error}"
            )
        return declared

    def objections(self, plan: RunPlan) -> list[str]:
        """What all plugins have to say against a plan, each sentence with who says it.

        Raises ``BrokenPlugin`` when a plugin fails instead of answering.
        """
        sentences: list[str] = []
        for found, answer in self._ask("torchweft_check_plan", plan=plan):
            # A lone string is a natural slip for one objection; its letters are not objections.
            said = [answer] if isinstance(answer, str) else list(answer)
            sentences.extend(f"{sentence} (says {found.provider})" for sentence in said)
        return sentences

    def worker_contexts(self, run: Any) -> list[AbstractContextManager[Any]]:
        """The context managers that plugins want around user code in this rank.

        Raises ``BrokenPlugin`` when a plugin fails instead of answering.
        """
        return [context for _, context in self._ask("torchweft_worker_context", run=run)]

    # -- collecting ----------------------------------------------------------------------------

    def _collect(self, module: ModuleType, found: Found) -> tuple[str, str, tuple[Spec, ...]]:
        """``(error, traceback, specs)`` of one module; it stays registered when it is sound."""
        for other, its in self._modules:
            if other is module:
                already = f"'{its.name}' ({its.provider})"
                return f"its module '{module.__name__}' is already plugin {already}", "", ()
        try:
            self._register(module, found)
            specs = tuple(self._specs(module, found.provider))
        except (Exception, SystemExit) as error:
            if self._pluggy.is_registered(module):
                self._pluggy.unregister(module)
            # Our own sentences say all; of a foreign error the type is half of the message.
            prefix = "" if isinstance(error, TorchweftError) else f"{type(error).__name__}: "
            return f"{prefix}{error}", "".join(traceback.format_exception(error)), ()
        self._modules.append((module, found))
        return "", "", specs

    def _register(self, module: ModuleType, found: Found) -> None:
        for hook in _HOOKS:
            value = vars(module).get(hook)
            # A module may import a hook's specification, which is a function of the same name.
            if (
                isinstance(value, FunctionType)
                and value is not getattr(hookspecs, hook)
                and self._pluggy.parse_hookimpl_opts(module, hook) is None
            ):
                raise BrokenPlugin(f"{hook}() of {found.provider} is not marked with @hookimpl")
        # With its provider, because two distributions may call their plugins the same.
        self._pluggy.register(module, name=f"{found.name} ({found.provider})")
        try:
            self._pluggy.check_pending()
        except pluggy.PluginValidationError:
            # A misspelt hook is an error and not a plugin that silently does nothing.
            unknown = next(name for name in self._implemented(module) if name not in _HOOKS)
            raise BrokenPlugin(
                f"{found.provider} implements the hook '{unknown}', which does not exist"
                f"{did_you_mean(unknown, _HOOKS) or ';'} the hooks are {', '.join(_HOOKS)}"
            ) from None

    def _implemented(self, module: ModuleType) -> list[str]:
        return sorted(caller.name for caller in self._pluggy.get_hookcallers(module) or ())

    def _specs(self, module: ModuleType, provider: str) -> Iterator[Spec]:
        implemented = self._implemented(module)
        for hook, kind in _DECLARING.items():
            if hook not in implemented:
                continue
            answer = self._call(hook, module, provider)
            if not isinstance(answer, Iterable):
                raise BrokenPlugin(
                    f"{hook}() of {provider} returned {answer!r}; return a list of {kind.__name__}"
                )
            for spec in answer:
                if not isinstance(spec, kind):
                    raise BrokenPlugin(
                        f"{hook}() of {provider} returned {spec!r}; "
                        f"each element must be a {kind.__name__}"
                    )
                wrong = faults(spec)
                if wrong:
                    raise BrokenPlugin(
                        f"{hook}() of {provider} declares {spec.kind} {spec.name!r}, which cannot "
                        f"be used: {'; '.join(wrong)}"
                    )
                yield spec

    # -- asking --------------------------------------------------------------------------------

    def _ask(self, hook: str, **arguments: Any) -> Iterator[tuple[Found, Any]]:
        """The answer of each plugin that implements ``hook``, in the order of registration.

        One plugin at a time, so that one which fails is named.
        """
        for module, found in self._modules:
            if hook in self._implemented(module):
                try:
                    answer = self._call(hook, module, found.provider, **arguments)
                except TorchweftError:
                    raise
                except Exception as error:
                    raise BrokenPlugin(
                        f"{hook}() of {found.provider} failed: {type(error).__name__}: {error}"
                    ) from error
                yield found, answer

    def _call(self, hook: str, module: ModuleType, provider: str, **arguments: Any) -> Any:
        others = [plugin for plugin in self._pluggy.get_plugins() if plugin is not module]
        results: list[Any] = self._pluggy.subset_hook_caller(hook, others)(**arguments)
        # pluggy drops None, so a hook that forgot its return statement has no result at all.
        if not results:
            raise BrokenPlugin(
                f"{hook}() of {provider} returned None; a hook that has nothing to give "
                f"returns {_NOTHING.get(hook, 'an empty list')}"
            )
        return results[0]


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise InvalidRequest(f"the environment variable {name} is '{value}'; it takes 1 or 0")
    return value == "1"
