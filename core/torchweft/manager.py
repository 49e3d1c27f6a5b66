"""The pluggy manager: plugins are registered one by one, checked, and asked for their specs."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from torchweft import __version__, hookspecs
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

__all__ = ["Declared", "HookCall", "Manager"]

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

_NEWER = "if the plugin is made for a newer torchweft, upgrade torchweft"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class HookCall:
    """A call of one plugin's hook, once it has ended.

    Attributes:
        hook: its name.
        plugin: whose implementation was called.
        provider: ``"distribution version"`` of that plugin.
        arguments: all that the hook has, also those that the implementation does not take.
        result: what it returned; None when it raised.
        error: what it raised.
    """

    hook: str
    plugin: str
    provider: str
    arguments: Mapping[str, Any]
    result: Any = None
    error: BaseException | None = None


class Manager:
    """The plugins of one ``Fabric`` or one command. Never shared, never global.

    ``environ`` is read for ``TORCHWEFT_DISABLE_PLUGINS`` (names separated by commas) and
    ``TORCHWEFT_TRACE`` (``1`` prints every hook call to stderr). Raises ``InvalidRequest`` for a
    value that cannot be used. ``listener`` is told of every call of a hook, in their order.

    Attributes:
        declared: every plugin that was added, in that order, also those that failed.
    """

    def __init__(
        self, environ: Mapping[str, str], listener: Callable[[HookCall], None] | None = None
    ) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.NAME)
        self._pluggy.add_hookspecs(hookspecs)
        self.declared: list[Declared] = []
        self._modules: list[tuple[ModuleType, Found]] = []
        #: By pluggy's name of a plugin.
        self._owners: dict[str, Found] = {}
        disabled = environ.get(_DISABLE, "")
        self._blocked = frozenset(name.strip() for name in disabled.split(",") if name.strip())
        for name in self._blocked:
            self._pluggy.set_blocked(name)
        if _flag(environ, "TORCHWEFT_TRACE"):
            self._pluggy.trace.root.setwriter(sys.stderr.write)
            self._pluggy.enable_tracing()
        if listener is not None:
            self._call_back(listener)

    @classmethod
    def from_entry_points(
        cls, environ: Mapping[str, str], listener: Callable[[HookCall], None] | None = None
    ) -> Manager:
        """A manager with every installed plugin that is not disabled.

        Raises ``InvalidRequest`` when ``TORCHWEFT_DISABLE_PLUGINS`` names a plugin that is not
        installed: a misspelt name would leave on what was to be switched off.
        """
        manager = cls(environ, listener)
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
            said = [answer] if isinstance(answer, str) else answer
            if not isinstance(said, Iterable):
                raise BrokenPlugin(
                    f"torchweft_check_plan() of {found.provider} returned {said!r}; return a list "
                    "of sentences"
                )
            sentences.extend(f"{sentence} (says {found.provider})" for sentence in said)
        return sentences

    def worker_contexts(self, run: Any) -> list[AbstractContextManager[Any]]:
        """The context managers that plugins want around user code in this rank.

        Raises ``BrokenPlugin`` when a plugin fails instead of answering.
        """
        contexts: list[AbstractContextManager[Any]] = []
        for found, context in self._ask("torchweft_worker_context", run=run):
            if not isinstance(context, AbstractContextManager):
                raise BrokenPlugin(
                    f"torchweft_worker_context() of {found.provider} returned {context!r}; return "
                    "a context manager"
                )
            contexts.append(context)
        return contexts

    def implemented(self, module: ModuleType) -> list[str]:
        """The names of the hooks that a registered module implements, sorted."""
        return sorted(caller.name for caller in self._pluggy.get_hookcallers(module) or ())

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
        for hook, function in self._marked(module):
            _check_arguments(hook, function, found.provider)
        # With its provider, because two distributions may call their plugins the same.
        name = f"{found.name} ({found.provider})"
        self._owners[name] = found
        self._pluggy.register(module, name=name)
        self._check_hooks(module, found.provider)

    def _marked(self, module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
        """The hooks that a module implements, and by which functions."""
        for name, value in vars(module).items():
            options = self._pluggy.parse_hookimpl_opts(module, name)
            if options is not None:
                yield options.get("specname") or name, value

    def _check_hooks(self, module: ModuleType, provider: str) -> None:
        try:
            self._pluggy.check_pending()
        except pluggy.PluginValidationError:
            # A misspelt hook is an error and not a plugin that silently does nothing.
            unknown = next(
                caller.name
                for caller in self._pluggy.get_hookcallers(module) or ()
                if not caller.has_spec()
                and not all(impl.optionalhook for impl in caller.get_hookimpls())
            )
            raise BrokenPlugin(
                f"{provider} implements the hook '{unknown}', which does not exist in torchweft "
                f"{__version__}{_nearest(unknown) or ';'} the hooks are "
                f"{', '.join(_HOOKS)}; {_NEWER}, or do without the hook here by "
                "@hookimpl(optionalhook=True)"
            ) from None
        for caller in self._pluggy.get_hookcallers(module) or ():
            mine = [impl for impl in caller.get_hookimpls() if impl.plugin is module]
            if len(mine) > 1:
                functions = ", ".join(f"{impl.function.__name__}()" for impl in mine)
                raise BrokenPlugin(
                    f"{provider} implements the hook '{caller.name}' {len(mine)} times, by "
                    f"{functions}; a plugin is asked once, so make them one function"
                )
            if mine[0].wrapper or mine[0].hookwrapper:
                raise BrokenPlugin(
                    f"{caller.name}() of {provider} is a wrapper; plugins are asked one by one, "
                    "so that there is nothing to wrap: leave wrapper= out of @hookimpl"
                )

    def _specs(self, module: ModuleType, provider: str) -> Iterator[Spec]:
        implemented = self.implemented(module)
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

    # -- listening -----------------------------------------------------------------------------

    def _call_back(self, listener: Callable[[HookCall], None]) -> None:
        def before(hook: str, impls: Sequence[pluggy.HookImpl], arguments: Any) -> None:
            """Nothing is known yet."""

        def after(
            outcome: pluggy.Result[Any],
            hook: str,
            impls: Sequence[pluggy.HookImpl],
            arguments: Mapping[str, Any],
        ) -> None:
            found = self._owners[impls[0].plugin_name]
            results = outcome.get_result() if outcome.exception is None else []
            listener(
                HookCall(
                    hook=hook,
                    plugin=found.name,
                    provider=found.provider,
                    arguments=dict(arguments),
                    # pluggy drops None.
                    result=results[0] if results else None,
                    error=outcome.exception,
                )
            )

        self._pluggy.add_hookcall_monitoring(before, after)

    # -- asking --------------------------------------------------------------------------------

    def _ask(self, hook: str, **arguments: Any) -> Iterator[tuple[Found, Any]]:
        """The answer of each plugin that implements ``hook``, in the order of registration.

        One plugin at a time, so that one which fails is named.
        """
        for module, found in self._modules:
            if hook in self.implemented(module):
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


def _nearest(unknown: str) -> str:
    # What all hooks have in common makes none of them the nearest.
    common = f"{hookspecs.NAME}_"
    words = [hook.removeprefix(common) for hook in _HOOKS]
    return did_you_mean(unknown.removeprefix(common), words).replace(" '", f" '{common}")


def _check_arguments(hook: str, function: FunctionType, provider: str) -> None:
    """An implementation may take fewer arguments than its hook has, and no others."""
    if hook not in _HOOKS:
        return
    known = inspect.signature(getattr(hookspecs, hook)).parameters
    for parameter in inspect.signature(function).parameters.values():
        # What has a default, and what takes anything, asks for nothing.
        asks = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if asks and parameter.name not in known:
            raise BrokenPlugin(
                f"{hook}() of {provider} takes the argument '{parameter.name}', which this hook "
                f"does not have in torchweft {__version__}"
                f"{did_you_mean(parameter.name, known) or ';'} it has "
                f"{', '.join(known) or 'none'}, and an implementation may take fewer; {_NEWER}"
            )


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise InvalidRequest(f"the environment variable {name} is '{value}'; it takes 1 or 0")
    return value == "1"
