"""Whether a plugin keeps what its entry point promises, whatever is behind its specs."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import importlib_metadata
import pytest

from torchweft import __version__, hookspecs
from torchweft.catalog import Catalog, Entry, disjoint, narrower, probe
from torchweft.discovery import canonical
from torchweft.errors import (
    BrokenPlugin,
    InvalidRequest,
    NotAvailable,
    UnknownOption,
    did_you_mean,
)
from torchweft.known import KNOWN
from torchweft.manager import Declared, Manager
from torchweft.options import check_options
from torchweft.request import RunRequest
from torchweft.resolve import resolve
from torchweft.specs import (
    AcceleratorSpec,
    LauncherSpec,
    PrecisionSpec,
    Preset,
    Spec,
    StrategySpec,
    load_target,
)
from torchweft.testing.constructor import needed, not_keywords, undocumented, untyped
from torchweft.testing.plugin_kit import PluginKit, kit_of, parameters_of
from torchweft.testing.trial import Tried

__all__ = ["PluginConformance"]

#: What fits into a row of ``torchweft plugins``.
_LONGEST_SUMMARY = 80


class PluginConformance:
    """That a plugin can be found, listed and chosen from, and harms no process by that.

    A whole test file::

        from torchweft.testing import PluginConformance

        class TestMyPlugin(PluginConformance):
            plugin = "mine"

    Attributes:
        plugin: name of the entry point in the group ``torchweft``.
    """

    plugin: ClassVar[str] = ""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make a test of each spec, probe, detection, preset and preloaded module."""
        kit = kit_of(metafunc.config, self.plugin)
        for argument, parameters in parameters_of(kit).items():
            if argument not in metafunc.fixturenames:
                continue
            why = "declares none" if kit.entries else "could not be loaded, or declares nothing"
            nothing = pytest.mark.skip(reason=f"plugin '{self.plugin}' {why}")
            metafunc.parametrize(
                argument,
                [pytest.param(each.value, id=each.label) for each in parameters]
                or [pytest.param(None, id="none", marks=nothing)],
            )

    @pytest.fixture
    def plugin_kit(self, request: pytest.FixtureRequest) -> PluginKit:
        """What the tests of one plugin share."""
        return kit_of(request.config, self.plugin)

    # -- the plugin --------------------------------------------------------------------------------

    def test_it_is_installed_once(self, plugin_kit: PluginKit) -> None:
        """One distribution has an entry point of that name in the group ``torchweft``."""
        if not plugin_kit.name:
            _fail(f"{type(self).__name__} names no plugin; write plugin = 'NAME' in it")
        if not plugin_kit.found:
            _fail(
                f"no plugin is called '{plugin_kit.name}'"
                f"{did_you_mean(plugin_kit.name, plugin_kit.names) or ';'} installed: "
                f"{', '.join(plugin_kit.names)}; a plugin is an entry point in the group "
                f"'{hookspecs.NAME}' of an installed distribution, so run pip install -e . after "
                "every change of [project.entry-points]"
            )
        if len(plugin_kit.found) > 1:
            providers = " and ".join(found.provider for found in plugin_kit.found)
            _fail(f"{providers} both call a plugin '{plugin_kit.name}'; uninstall one of them")

    def test_it_loads(self, plugin_kit: PluginKit) -> None:
        """Its module imports, its hooks are known, take what they may take, and declare specs."""
        if plugin_kit.declared is None:
            pytest.skip(f"plugin '{plugin_kit.name}' is not installed once")
        if plugin_kit.declared.error:
            _fail(f"{plugin_kit.declared.failure}\n\n{plugin_kit.declared.trace}")

    def test_its_distribution_requires_torchweft(self, plugin_kit: PluginKit) -> None:
        """So that installing the plugin installs what it plugs into, of a version that fits."""
        declared = plugin_kit.loaded()
        requires = importlib_metadata.requires(declared.distribution) or []
        names = [re.split(r"[^\w.-]", each)[0] for each in requires if "extra ==" not in each]
        if hookspecs.NAME not in map(canonical, [declared.distribution, *names]):
            major, minor = __version__.split(".")[:2]
            _fail(
                f"{declared.provider} requires {', '.join(names) or 'nothing'}; add "
                f'"torchweft>={major}.{minor},<{major}.{int(minor) + 1}" to dependencies in its '
                "pyproject.toml"
            )

    def test_its_hooks_module_imports_without_torch(self, plugin_kit: PluginKit) -> None:
        """It is imported to list what is installed, which must take no second."""
        declared = plugin_kit.loaded()
        tried = plugin_kit.without_torch.hooks
        if tried.error:
            _fail(
                f"the hooks module of {declared.provider} does not import in a fresh interpreter: "
                f"{tried.error}\n\n{tried.trace}"
            )
        _no_heavy_imports(f"the hooks module of {declared.provider}", tried)

    def test_it_declares_the_same_every_time(self, plugin_kit: PluginKit) -> None:
        """Ranks make the plan again, each in its own process."""
        declared = plugin_kit.loaded()
        again = Manager({}).add(plugin_kit.found[0])
        elsewhere = plugin_kit.without_torch
        answers = {"when it was asked again": again.error or repr(again.specs)}
        if not elsewhere.hooks.error:
            answers["in a fresh interpreter"] = elsewhere.specs
        first = repr(declared.specs)
        for when, answer in answers.items():
            if answer != first:
                _fail(
                    f"{declared.provider} declared\n  {first}\nand, {when},\n  {answer}\n"
                    "what a hook declares may not depend on what was imported or called before; "
                    "whether it can be used here is for the probe to say"
                )

    @pytest.mark.parametrize("hook", ["torchweft_check_plan", "torchweft_worker_context"])
    def test_its_hook_answers_in_a_run(self, plugin_kit: PluginKit, hook: str) -> None:
        """What it has against a plan, or puts around user code, of one process on the CPU."""
        declared = plugin_kit.loaded()
        if hook not in plugin_kit.hooks:
            pytest.skip(f"{declared.provider} does not implement {hook}()")
        wrong = plugin_kit.with_torch.answers.get(hook)
        if wrong is None:
            pytest.skip(f"{hook}() was not called: something objects to such a run")
        if wrong:
            _fail(
                f"{hook}() of {declared.provider} {wrong}; torchweft.hookspecs says what it returns"
            )

    # -- each spec ---------------------------------------------------------------------------------

    def test_its_summary_is_one_line(self, declared_entry: Entry) -> None:
        """It is a row of ``torchweft plugins``."""
        summary = declared_entry.spec.summary
        wrong = [
            clause
            for holds, clause in (
                (not summary.strip(), "is empty"),
                (len(summary.splitlines()) > 1, "has several lines"),
                (len(summary) > _LONGEST_SUMMARY, f"has {len(summary)} characters"),
                (summary.endswith("."), "ends with a full stop"),
            )
            if holds
        ]
        if wrong:
            _fail(
                f"the summary {summary!r} of {_told(declared_entry)} {' and '.join(wrong)}; write "
                f"one line of at most {_LONGEST_SUMMARY} characters, without a full stop, as "
                "summary= of its spec"
            )

    def test_its_names_are_nobody_else_s(
        self, plugin_kit: PluginKit, declared_entry: Entry
    ) -> None:
        """No other spec answers to one of its names in the same case, installed or its own."""
        spec = declared_entry.spec
        for name in spec.names():
            if spec.names().count(name) > 1:
                _fail(f"{_told(declared_entry)} lists the name '{name}' twice; list it once")
            for other in plugin_kit.catalog.named(spec.kind, name):
                if other is not declared_entry and _clash(spec, other.spec):
                    _fail(
                        f"{_told(declared_entry)} answers to '{name}', and so does "
                        f"{_told(other)}, for the same devices and strategies, so that asking for "
                        "it is an error; choose another name, or restrict one of the two by "
                        "devices= or strategies="
                    )

    def test_its_target_loads(self, declared_entry: Entry) -> None:
        """The class that the spec names can be imported."""
        try:
            load_target(declared_entry.spec.target, declared_entry.provider)
        except BrokenPlugin as error:
            answer = probe(declared_entry)
            if not answer.ok:
                pytest.skip(f"{error}; its probe says that it cannot be used here: {answer.reason}")
            _fail(
                f"{_told(declared_entry)}: {error}; write target= as 'package.module:Class', or "
                "let its probe say what is missing here"
            )

    def test_its_class_is_of_its_kind(self, declared_entry: Entry) -> None:
        """The target is a complete subclass of the kind's base class in ``torchweft.api``."""
        cls = _target(declared_entry)
        base = _base(declared_entry.spec.kind)
        if not isinstance(cls, type) or not issubclass(cls, base):
            _fail(
                f"the target '{declared_entry.spec.target}' of {_told(declared_entry)} is {cls!r}, "
                f"and not a subclass of torchweft.api.{base.__name__}"
            )
        if _missing(cls):
            _fail(
                f"the class {cls.__name__} of {_told(declared_entry)} does not define "
                f"{', '.join(_missing(cls))}, which torchweft.api.{base.__name__} leaves to it"
            )

    def test_its_class_can_be_pickled_by_name(self, declared_entry: Entry) -> None:
        """Launchers that start fresh processes name it there."""
        cls = _class(declared_entry)
        try:
            same = pickle.loads(pickle.dumps(cls)) is cls
        except Exception as error:
            same, why = False, f": {type(error).__name__}: {error}"
        else:
            why = f": '{cls.__module__}.{cls.__qualname__}' is another object"
        if not same:
            _fail(
                f"the class {cls.__name__} of {_told(declared_entry)} cannot be pickled by its "
                f"name{why}; define it with class at the top level of a module"
            )

    def test_importing_it_touches_no_device(
        self, plugin_kit: PluginKit, declared_entry: Entry
    ) -> None:
        """The class is imported before ranks are forked, and an open device does not survive it."""
        target = declared_entry.spec.target
        tried = plugin_kit.with_torch.targets[target]
        if tried.error:
            pytest.skip(f"its target does not load: {tried.error}")
        _no_devices(f"importing the target '{target}' of {_told(declared_entry)}", tried)

    # -- its options -------------------------------------------------------------------------------

    def test_its_options_are_keywords(self, declared_entry: Entry) -> None:
        """``name=value`` behind a colon reaches every parameter of the constructor."""
        cls = _class(declared_entry)
        wrong = not_keywords(cls)
        if wrong:
            _fail(
                f"the constructor of {cls.__name__} ({_told(declared_entry)}) takes "
                f"{', '.join(wrong)} by position alone, so that nobody can write it as an option; "
                "make it a keyword"
            )

    def test_its_options_are_typed(self, declared_entry: Entry) -> None:
        """A value on a command line is checked against the annotation."""
        cls = _class(declared_entry)
        wrong = untyped(cls)
        if wrong:
            _fail(
                f"the constructor of {cls.__name__} ({_told(declared_entry)}) has no annotation "
                f"for {', '.join(wrong)}; write one, such as {wrong[0]}: int | None = None"
            )

    def test_its_options_are_documented(self, declared_entry: Entry) -> None:
        """Each stands in the docstring, or is a keyword of a class that the docstring names."""
        cls = _class(declared_entry)
        wrong = undocumented(cls)
        if wrong:
            _fail(
                f"the docstring of {cls.__name__} ({_told(declared_entry)}) says nothing about the "
                f"option {' and '.join(map(repr, wrong))}; add the line '{wrong[0]}: …' under "
                "'Args:', or name the class whose keyword it is as ``package.module.Class``"
            )

    def test_an_unknown_option_is_refused(self, declared_entry: Entry) -> None:
        """The error names the spec; ``**kwargs`` would take in every slip of the pen."""
        spec, cls = declared_entry.spec, _class(declared_entry)
        asked = "torchweft_no_such_option"
        try:
            check_options(spec.kind, spec.name, cls, {asked: 1})
        except UnknownOption as error:
            assert f"{spec.kind} '{spec.name}' has no option '{asked}'" in str(error)  # noqa: PT017
        else:
            _fail(
                f"the constructor of {cls.__name__} ({_told(declared_entry)}) takes any option at "
                "all, so that a misspelt one is no error; list its keywords in place of **kwargs"
            )

    def test_constructing_it_does_nothing_else(
        self, plugin_kit: PluginKit, declared_entry: Entry
    ) -> None:
        """With its defaults it reads and writes no file, starts nothing and touches no device."""
        cls, target = _class(declared_entry), declared_entry.spec.target
        if _missing(cls):
            pytest.skip(f"{cls.__name__} does not define {', '.join(_missing(cls))}")
        if needed(cls):
            pytest.skip(f"{cls.__name__} needs the option {', '.join(needed(cls))}")
        tried = plugin_kit.with_torch.constructed[target]
        where = f"constructing {cls.__name__} ({_told(declared_entry)})"
        if tried.error:
            _fail(f"{where} with its defaults failed: {tried.error}\n\n{tried.trace}")
        if tried.did:
            _fail(
                f"{where} did {'; '.join(tried.did)}; a constructor keeps its options, and the "
                "rest is for start(), bind() or launch() to do, in every process"
            )
        _no_devices(where, tried)

    # -- its probe ---------------------------------------------------------------------------------

    def test_its_probe_imports_no_torch(
        self, plugin_kit: PluginKit, probe_target: tuple[Entry, str]
    ) -> None:
        """It is asked whenever plugins are listed or a plan is made."""
        entry, target = probe_target
        _no_heavy_imports(_the("probe", target, entry), plugin_kit.without_torch.targets[target])

    def test_its_probe_touches_no_device(
        self, plugin_kit: PluginKit, probe_target: tuple[Entry, str]
    ) -> None:
        """Ranks are forked after it, also where torch was imported before."""
        entry, target = probe_target
        for report in (plugin_kit.without_torch, plugin_kit.with_torch):
            _no_devices(_the("probe", target, entry), report.targets[target])

    def test_its_probe_returns_an_availability(
        self, plugin_kit: PluginKit, probe_target: tuple[Entry, str]
    ) -> None:
        """And raises nothing, whatever is missing here."""
        entry, target = probe_target
        tried = plugin_kit.without_torch.targets[target]
        told = _the("probe", target, entry)
        if tried.error:
            _fail(
                f"{told} raised {tried.error}; it has to answer Availability(ok=False, reason=…, "
                f"hint=…)\n\n{tried.trace}"
            )
        answer = tried.availability
        if answer is None:
            _fail(f"{told} returned {tried.answer}, and not a torchweft.specs.Availability")
        # Anything may be in a record that checks nothing.
        count: Any = answer.count
        sound = isinstance(answer.ok, bool) and (
            count is None or (isinstance(count, int) and count >= 0)
        )
        if not sound:
            _fail(
                f"{told} returned {tried.answer}; ok is True or False, and count a number of "
                "devices or None"
            )

    def test_a_probe_that_says_no_says_why_and_what_to_do(
        self, plugin_kit: PluginKit, probe_target: tuple[Entry, str]
    ) -> None:
        """``reason`` and ``hint`` are what a user reads who asks for it all the same."""
        entry, target = probe_target
        answer = plugin_kit.without_torch.targets[target].availability
        if answer is None or answer.ok:
            pytest.skip("the probe does not say no here")
        missing = [word for word in ("reason", "hint") if not getattr(answer, word)]
        if missing:
            _fail(
                f"{_the('probe', target, entry)} says no without a {' and a '.join(missing)}: "
                f"{answer!r}; tell what is missing here, and what would help"
            )

    def test_asking_for_it_where_it_cannot_be_used_says_so(
        self, plugin_kit: PluginKit, probed_entry: Entry
    ) -> None:
        """The error names the provider, the probe's reason and its hint."""
        spec = probed_entry.spec
        tried = plugin_kit.without_torch.targets[spec.probe]
        if tried.availability is not None and tried.availability.ok:
            pytest.skip("it can be used here")
        if isinstance(spec, LauncherSpec) and spec.outside:
            pytest.skip("it is not asked for, it is found")
        with pytest.raises(NotAvailable) as raised:
            _resolve_alone(probed_entry)
        answer = probe(probed_entry)
        for word in (probed_entry.provider, spec.name, answer.reason, answer.hint):
            assert word in str(raised.value)

    # -- its detection -----------------------------------------------------------------------------

    def test_its_detection_imports_no_torch(
        self, plugin_kit: PluginKit, detect_target: tuple[Entry, str]
    ) -> None:
        """It is asked whenever a plan is made."""
        entry, target = detect_target
        told = _the("detection", target, entry)
        _no_heavy_imports(told, plugin_kit.without_torch.targets[target])

    def test_its_detection_touches_no_device(
        self, plugin_kit: PluginKit, detect_target: tuple[Entry, str]
    ) -> None:
        """Ranks are forked after it, also where torch was imported before."""
        entry, target = detect_target
        for report in (plugin_kit.without_torch, plugin_kit.with_torch):
            _no_devices(_the("detection", target, entry), report.targets[target])

    def test_its_detection_finds_nothing_in_an_empty_environment(
        self, plugin_kit: PluginKit, detect_target: tuple[Entry, str]
    ) -> None:
        """It goes by the variables that it is given, and by nothing else."""
        entry, target = detect_target
        tried = plugin_kit.without_torch.targets[target]
        told = _the("detection", target, entry)
        if tried.error:
            _fail(f"{told} raised {tried.error} for an empty environment\n\n{tried.trace}")
        if tried.answer != "None":
            _fail(f"{told} returned {tried.answer} for an empty environment, and not None")

    # -- what a strategy has -----------------------------------------------------------------------

    def test_a_preset_s_options_fit_the_constructor(self, preset: tuple[Entry, Preset]) -> None:
        """Its options are known to the class, with values of their types."""
        entry, given = preset
        cls = _class(entry)
        # What else the class needs is for the user to write behind the preset's name.
        rest = {name: None for name in needed(cls) if name not in given.options}
        partly: Any = functools.partial(cls, **rest)
        partly.__name__ = cls.__name__
        try:
            check_options("strategy", given.alias, partly, given.options)
        except InvalidRequest as error:
            _fail(f"the preset '{given.alias}' of {_told(entry)} cannot be asked for: {error}")

    def test_a_preset_s_launcher_exists(
        self, plugin_kit: PluginKit, preset: tuple[Entry, Preset]
    ) -> None:
        """It is installed, or one that torchweft knows where to get."""
        entry, given = preset
        launchers = plugin_kit.catalog.names("launcher")
        named = given.launcher
        if named is None or named in launchers or ("launcher", named) in KNOWN:
            return
        _fail(
            f"the preset '{given.alias}' of {_told(entry)} needs launcher '{named}', which nobody "
            f"declares{did_you_mean(named, launchers) or ';'} installed: {', '.join(launchers)}"
        )

    def test_a_preloaded_module_imports_and_touches_no_device(
        self, plugin_kit: PluginKit, preload: tuple[Entry, str]
    ) -> None:
        """It is imported before ranks are forked."""
        entry, module = preload
        tried = plugin_kit.with_torch.preloaded[module]
        where = f"importing '{module}', a preload of {_told(entry)},"
        if tried.error:
            _fail(f"{where} failed: {tried.error}\n\n{tried.trace}")
        _no_devices(where, tried)


def _fail(sentence: str) -> NoReturn:
    # The sentence says it all; what the kit did to find it out is of no use to an author.
    pytest.fail(sentence, pytrace=False)


def _told(entry: Entry) -> str:
    return f"{entry.spec.kind} {entry.describe()}"


def _the(what: str, target: str, entry: Entry) -> str:
    return f"the {what} '{target}' of {_told(entry)}"


def _no_heavy_imports(what: str, tried: Tried) -> None:
    for module, line in tried.imported.items():
        _fail(
            f"{what} imports {module} ({line}), which takes seconds and is done to list what is "
            "installed; move what needs it behind a target, or find it out from files"
        )


def _no_devices(what: str, tried: Tried) -> None:
    if tried.touched:
        _fail(
            f"{what} touched a device: afterwards {', '.join(tried.touched)}; a process that is "
            "forked then has a broken one, so leave that to what runs in every rank"
        )


def _base(kind: str) -> type:
    from torchweft import api

    bases: Mapping[str, type] = {
        "accelerator": api.Accelerator,
        "strategy": api.Strategy,
        "precision": api.Precision,
        "launcher": api.Launcher,
    }
    return bases[kind]


def _target(entry: Entry) -> Any:
    try:
        return load_target(entry.spec.target, entry.provider)
    except BrokenPlugin as error:
        pytest.skip(str(error))


def _class(entry: Entry) -> type:
    cls: Any = _target(entry)
    if not isinstance(cls, type):
        pytest.skip(f"its target is {cls!r}, which is no class")
    return cls


def _missing(cls: type) -> list[str]:
    """What a base class leaves to its subclasses, and this one does not define."""
    return sorted(getattr(cls, "__abstractmethods__", ()))


def _clash(a: Spec, b: Spec) -> bool:
    return not (narrower(a, b) or narrower(b, a) or disjoint(a, b))


def _resolve_alone(entry: Entry) -> None:
    """Ask for a spec where everything else that a run needs is there."""
    spec, target = entry.spec, entry.spec.target
    devices = 2 if isinstance(spec, LauncherSpec) and spec.processes == "many" else 1
    around: list[Spec] = [
        AcceleratorSpec(name="other", target=target, device=(*spec.devices, "cpu")[0], priority=0),
        StrategySpec(name=(*spec.strategies, "other")[0], target=target, priority=0),
        PrecisionSpec(name="other", target=target, priority=0),
    ]
    specs = (spec, *(each for each in around if each.kind != spec.kind))
    name, _, version = entry.provider.rpartition(" ")
    catalog = Catalog(
        [Declared(plugin=entry.plugin, distribution=name, version=version, specs=specs)]
    )
    asked: dict[str, Any] = {spec.kind: spec.name, "devices": devices}
    resolve(RunRequest.parse(**asked), catalog, environ={})
