from __future__ import annotations

import json
from contextlib import nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from torchweft import __version__
from torchweft.discovery import Found
from torchweft.errors import BrokenPlugin, InvalidRequest
from torchweft.manager import Declared, HookCall, Manager

if TYPE_CHECKING:
    from tests.core.conftest import Site

GOOD = """
from torchweft.hookspecs import hookimpl
from torchweft.specs import StrategySpec

@hookimpl
def torchweft_strategies():
    return [StrategySpec(name="acme", target="acme:Acme")]
"""


def module(source: str, name: str = "acme_hooks") -> ModuleType:
    made = ModuleType(name)
    exec(
        "from torchweft.hookspecs import hookimpl\nfrom torchweft.specs import *\n" + source,
        vars(made),
    )
    return made


def add(manager: Manager, source: str, name: str = "acme") -> Declared:
    return manager.add(
        Found(
            name=name,
            distribution=f"torchweft-{name}",
            version="0.1",
            module=module(source, f"{name}_hooks"),
        )
    )


def names(declared: Declared) -> list[str]:
    return [spec.name for spec in declared.specs]


# -- collecting --------------------------------------------------------------------------------


def test_a_plugin_is_asked_for_its_own_specs() -> None:
    manager = Manager({})
    first = add(manager, GOOD)
    second = add(manager, GOOD.replace('"acme"', '"other"'), name="other")
    assert (names(first), names(second)) == (["acme"], ["other"])
    assert [each.plugin for each in manager.declared] == ["acme", "other"]
    assert first.provider == "torchweft-acme 0.1"


def test_a_plugin_may_implement_nothing() -> None:
    declared = add(Manager({}), "")
    assert (declared.specs, declared.error, declared.disabled) == ((), "", False)


def test_specs_may_be_yielded_one_by_one() -> None:
    declared = add(Manager({}), GOOD.replace("return [", "yield ").replace(")]", ")"))
    assert names(declared) == ["acme"]


def test_a_hook_may_be_implemented_under_another_name() -> None:
    source = GOOD.replace("@hookimpl", "@hookimpl(specname='torchweft_strategies')").replace(
        "def torchweft_strategies", "def mine"
    )
    assert names(add(Manager({}), source)) == ["acme"]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            GOOD.replace("def torchweft_strategies", "def torchweft_strategys"),
            (
                "torchweft-acme 0.1 implements the hook 'torchweft_strategys', which does not "
                f"exist in torchweft {__version__}; did you mean 'torchweft_strategies'? the hooks "
                "are torchweft_accelerators, torchweft_check_plan, torchweft_launchers, "
                "torchweft_precisions, torchweft_strategies, torchweft_worker_context; if the "
                "plugin is made for a newer torchweft, upgrade torchweft, or do without the hook "
                "here by @hookimpl(optionalhook=True)"
            ),
        ),
        (
            GOOD.replace("    return", "    "),
            (
                "torchweft_strategies() of torchweft-acme 0.1 returned None; "
                "a hook that has nothing to give returns an empty list"
            ),
        ),
        (
            GOOD.replace("@hookimpl", ""),
            "torchweft_strategies() of torchweft-acme 0.1 is not marked with @hookimpl",
        ),
        (
            GOOD.replace("return [StrategySpec", "return [PrecisionSpec"),
            (
                "torchweft_strategies() of torchweft-acme 0.1 returned PrecisionSpec(name='acme', "
                "target='acme:Acme', summary='', aliases=(), priority=None, probe='', devices=(), "
                "strategies=(), exclusive=()); each element must be a StrategySpec"
            ),
        ),
        (
            "@hookimpl\ndef torchweft_strategies(): return 7",
            (
                "torchweft_strategies() of torchweft-acme 0.1 returned 7; "
                "return a list of StrategySpec"
            ),
        ),
        (
            GOOD.replace('name="acme"', 'name="acme", aliases="ac"'),
            (
                "torchweft_strategies() of torchweft-acme 0.1 declares strategy 'acme', which "
                "cannot be used: aliases='ac' is not of the type tuple[str, ...]"
            ),
        ),
        (
            GOOD.replace("target=", "interconnect='ring', target="),
            (
                "TypeError: StrategySpec.__init__() got an unexpected keyword argument "
                "'interconnect'"
            ),
        ),
        (
            GOOD + "@hookimpl(specname='torchweft_strategies')\ndef more(): return []",
            (
                "torchweft-acme 0.1 implements the hook 'torchweft_strategies' 2 times, by "
                "more(), torchweft_strategies(); a plugin is asked once, so make them one function"
            ),
        ),
        (
            "@hookimpl(wrapper=True)\ndef torchweft_strategies(): return (yield)",
            (
                "torchweft_strategies() of torchweft-acme 0.1 is a wrapper; plugins are asked one "
                "by one, so that there is nothing to wrap: leave wrapper= out of @hookimpl"
            ),
        ),
        (
            GOOD.replace("    return", "    raise OSError('no disk')\n    return"),
            "OSError: no disk",
        ),
        (
            GOOD.replace("    return", "    raise SystemExit(3)\n    return"),
            "SystemExit: 3",
        ),
    ],
    ids=[
        "misspelt",
        "none",
        "unmarked",
        "kind",
        "no list",
        "unsound",
        "unknown field",
        "twice",
        "wrapper",
        "raises",
        "exits",
    ],
)
def test_a_plugin_that_declares_wrongly_is_recorded_and_gone(source: str, error: str) -> None:
    manager = Manager({})
    broken = add(manager, source + "\n@hookimpl\ndef torchweft_check_plan(plan): return ['no']")
    good = add(manager, GOOD, name="good")
    assert broken.error == error
    assert broken.specs == ()
    assert broken.failure == f"plugin 'acme' (torchweft-acme 0.1) failed to load: {error}"
    assert error.split(": ")[-1] in broken.trace
    assert names(good) == ["acme"]
    plan: Any = object()
    assert manager.objections(plan) == []


def test_a_plugin_that_is_made_for_a_newer_torchweft_is_told_so() -> None:
    declared = add(Manager({}), GOOD + "@hookimpl\ndef torchweft_samplers(plan): return []")
    assert declared.specs == ()
    assert declared.error == (
        "torchweft-acme 0.1 implements the hook 'torchweft_samplers', which does not exist in "
        f"torchweft {__version__}; the hooks are torchweft_accelerators, torchweft_check_plan, "
        "torchweft_launchers, torchweft_precisions, torchweft_strategies, "
        "torchweft_worker_context; if the plugin is made for a newer torchweft, upgrade torchweft, "
        "or do without the hook here by @hookimpl(optionalhook=True)"
    )


def test_a_plugin_may_do_without_a_hook_of_a_newer_torchweft() -> None:
    newer = "@hookimpl(optionalhook=True)\ndef torchweft_samplers(plan): return []\n"
    manager = Manager({})
    declared = add(manager, GOOD + newer)
    assert (names(declared), declared.error) == (["acme"], "")
    # The optional one is not blamed for a misspelt one beside it.
    slip = "@hookimpl\ndef torchweft_zzz(): return []"
    assert "the hook 'torchweft_zzz', which" in add(manager, newer + slip, name="other").error


def test_a_hook_with_an_argument_that_it_does_not_have_is_an_error() -> None:
    declared = add(Manager({}), "@hookimpl\ndef torchweft_check_plan(plam): return []")
    assert declared.error == (
        "torchweft_check_plan() of torchweft-acme 0.1 takes the argument 'plam', which this hook "
        f"does not have in torchweft {__version__}; did you mean 'plan'? it has plan, and an "
        "implementation may take fewer; if the plugin is made for a newer torchweft, upgrade "
        "torchweft"
    )
    declared = add(Manager({}), GOOD.replace("strategies()", "strategies(plan)"))
    assert "the argument 'plan', which" in declared.error
    assert "; it has none, and" in declared.error


@pytest.mark.parametrize("arguments", ["", "plan", "plan, more=3", "*plan, **more"])
def test_an_implementation_may_take_fewer_arguments_than_its_hook(arguments: str) -> None:
    manager = Manager({})
    declared = add(manager, f"@hookimpl\ndef torchweft_check_plan({arguments}): return ['no']")
    assert declared.error == ""
    assert manager.objections(PLAN) == ["no (says torchweft-acme 0.1)"]


def test_the_specification_itself_is_no_implementation() -> None:
    source = "from torchweft.hookspecs import torchweft_strategies"
    assert add(Manager({}), source).error == ""


def test_an_import_error_is_passed_on() -> None:
    declared = Manager({}).add(
        Found(
            name="acme",
            distribution="torchweft-acme",
            version="0.1",
            error="ModuleNotFoundError: No module named 'acme_comm'",
        )
    )
    assert declared.failure == (
        "plugin 'acme' (torchweft-acme 0.1) failed to load: "
        "ModuleNotFoundError: No module named 'acme_comm'"
    )


def test_two_distributions_may_call_their_plugin_the_same() -> None:
    manager = Manager({})
    for distribution in ("torchweft-acme", "torchweft-other"):
        declared = manager.add(
            Found(name="acme", distribution=distribution, version="1", module=module(GOOD))
        )
        assert declared.error == ""


def test_one_module_is_registered_once() -> None:
    manager = Manager({})
    shared = module(GOOD)
    manager.add(Found(name="a", distribution="torchweft-a", version="1", module=shared))
    again = manager.add(Found(name="b", distribution="torchweft-b", version="1", module=shared))
    assert again.error == "its module 'acme_hooks' is already plugin 'a' (torchweft-a 1)"
    # The first is still there.
    assert names(manager.declared[0]) == ["acme"]


# -- plugins= ----------------------------------------------------------------------------------


def test_a_module_of_the_user() -> None:
    manager = Manager({})
    declared = manager.add_module(module(GOOD, "my_hooks"))
    assert (declared.plugin, declared.provider) == ("my_hooks", "the module 'my_hooks'")
    assert names(declared) == ["acme"]


def test_a_module_of_the_user_that_is_wrong_is_raised() -> None:
    with pytest.raises(
        BrokenPlugin,
        match=r"^the module 'my_hooks' given in plugins= cannot be used: torchweft_strategies\(\) "
        r"of the module 'my_hooks' returned None;",
    ):
        Manager({}).add_module(module(GOOD.replace("return", ""), "my_hooks"))


# -- asking ------------------------------------------------------------------------------------

PLAN: Any = "the plan"


def test_objections_name_who_objects() -> None:
    manager = Manager({})
    add(manager, "@hookimpl\ndef torchweft_check_plan(plan): return [f'not {plan}', 'nor that']")
    add(manager, "@hookimpl\ndef torchweft_check_plan(plan): return 'a lone one'", name="other")
    add(manager, "@hookimpl\ndef torchweft_check_plan(plan): return []", name="third")
    assert manager.objections(PLAN) == [
        "not the plan (says torchweft-acme 0.1)",
        "nor that (says torchweft-acme 0.1)",
        "a lone one (says torchweft-other 0.1)",
    ]


def test_contexts_come_in_the_order_of_the_plugins() -> None:
    manager = Manager({})
    source = (
        "from contextlib import nullcontext\n"
        "@hookimpl\ndef torchweft_worker_context(run): return nullcontext((run, __name__))"
    )
    add(manager, source)
    add(manager, source, name="other")
    contexts = manager.worker_contexts("run")
    assert [type(context) for context in contexts] == [nullcontext, nullcontext]
    assert [context.__enter__()[0] for context in contexts] == ["run", "run"]


@pytest.mark.parametrize("hook", ["torchweft_check_plan(plan)", "torchweft_worker_context(run)"])
def test_a_plugin_that_fails_when_asked_is_named(hook: str) -> None:
    manager = Manager({})
    add(manager, f"@hookimpl\ndef {hook}: raise KeyError('x')")
    with pytest.raises(
        BrokenPlugin,
        match=r"^torchweft_\w+\(\) of torchweft-acme 0\.1 failed: KeyError: 'x'$",
    ):
        manager.objections(PLAN) or manager.worker_contexts(PLAN)


@pytest.mark.parametrize(
    ("hook", "wanted"),
    [
        ("torchweft_check_plan(plan)", "a list of sentences"),
        ("torchweft_worker_context(run)", "a context manager"),
    ],
)
def test_a_plugin_that_answers_with_something_else_is_named(hook: str, wanted: str) -> None:
    manager = Manager({})
    add(manager, f"@hookimpl\ndef {hook}: return 7")
    with pytest.raises(
        BrokenPlugin,
        match=rf"^torchweft_\w+\(\) of torchweft-acme 0\.1 returned 7; return {wanted}$",
    ):
        manager.objections(PLAN) or manager.worker_contexts(PLAN)


def test_an_error_on_purpose_is_passed_on_as_it_is() -> None:
    manager = Manager({})
    add(
        manager,
        "from torchweft.errors import InvalidRequest\n"
        "@hookimpl\ndef torchweft_check_plan(plan): raise InvalidRequest('no such thing')",
    )
    with pytest.raises(InvalidRequest, match=r"^no such thing$"):
        manager.objections(PLAN)


# -- listening ---------------------------------------------------------------------------------


def test_a_listener_hears_of_every_call_and_how_it_ended() -> None:
    heard: list[HookCall] = []
    manager = Manager({}, heard.append)
    add(manager, GOOD)
    fails = "@hookimpl\ndef torchweft_check_plan(): raise KeyError('x')"
    add(manager, fails, name="other")
    with pytest.raises(BrokenPlugin):
        manager.objections(PLAN)
    declared, objected = heard
    assert (declared.hook, declared.plugin, declared.arguments) == (
        "torchweft_strategies",
        "acme",
        {},
    )
    assert [spec.name for spec in declared.result] == ["acme"]
    assert declared.error is None
    assert (objected.hook, objected.provider) == ("torchweft_check_plan", "torchweft-other 0.1")
    # All that the hook has, whatever the implementation takes.
    assert objected.arguments == {"plan": PLAN}
    assert (objected.result, repr(objected.error)) == (None, "KeyError('x')")


def test_a_listener_hears_of_a_plugin_that_is_refused() -> None:
    heard: list[HookCall] = []
    add(Manager({}, heard.append), GOOD.replace("return", ""))
    assert [(call.hook, call.result) for call in heard] == [("torchweft_strategies", None)]


def test_a_listener_hears_of_the_plugins_that_are_installed() -> None:
    heard: list[HookCall] = []
    Manager.from_entry_points({}, heard.append)
    assert ("builtin", "torchweft_accelerators") in [(call.plugin, call.hook) for call in heard]


# -- the environment ---------------------------------------------------------------------------

LISTING = """
import json, os
from torchweft.manager import Manager
manager = Manager.from_entry_points(os.environ)
print(json.dumps({d.plugin: [d.provider, d.error, d.disabled, [s.name for s in d.specs]]
                  for d in manager.declared}))
"""


def test_real_plugins_good_and_bad(site: Site) -> None:
    site.install("torchweft-acme", GOOD)
    site.install("torchweft-broken", "import acme_comm", plugin="broken", module="broken_hooks")
    site.install(
        "torchweft-slip",
        GOOD.replace("torchweft_strategies", "torchweft_strategys"),
        plugin="slip",
        module="slip_hooks",
    )
    site.install("torchweft-none", GOOD.replace("return", ""), plugin="none", module="none_hooks")
    site.install("torchweft-exits", "import sys; sys.exit()", plugin="exits", module="exits_hooks")
    listed = json.loads(site.run(LISTING))
    assert listed["acme"] == ["torchweft-acme 0.1", "", False, ["acme"]]
    assert listed["broken"][1] == "ModuleNotFoundError: No module named 'acme_comm'"
    assert "implements the hook 'torchweft_strategys', which does not" in listed["slip"][1]
    assert "returned None" in listed["none"][1]
    assert listed["exits"][1] == "SystemExit: "
    assert listed["builtin"][1:3] == ["", False]
    assert "cpu" in listed["builtin"][3]


def test_a_disabled_plugin_is_listed_and_not_imported(site: Site) -> None:
    site.install("torchweft-acme", "raise SystemExit('imported')")
    listed = json.loads(site.run(LISTING, TORCHWEFT_DISABLE_PLUGINS="acme , cuda"))
    assert listed["acme"] == ["torchweft-acme 0.1", "", True, []]
    assert listed["cuda"][2:] == [True, []]
    assert listed["builtin"][2] is False


def test_a_module_of_the_user_can_be_disabled_too() -> None:
    manager = Manager({"TORCHWEFT_DISABLE_PLUGINS": "my_hooks"})
    declared = manager.add_module(module(GOOD, "my_hooks"))
    assert (declared.disabled, declared.specs) == (True, ())


def test_disabling_what_is_not_installed_is_an_error() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^the environment variable TORCHWEFT_DISABLE_PLUGINS names 'biultin', and no plugin "
        r"that is installed is called that; did you mean 'builtin'\? installed: builtin",
    ):
        Manager.from_entry_points({"TORCHWEFT_DISABLE_PLUGINS": "biultin"})


@pytest.mark.parametrize("value", ["", " ", ","])
def test_an_empty_list_of_disabled_plugins_disables_nothing(value: str) -> None:
    manager = Manager.from_entry_points({"TORCHWEFT_DISABLE_PLUGINS": value})
    assert not any(each.disabled for each in manager.declared)


def test_every_hook_call_is_traced_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    add(Manager({"TORCHWEFT_TRACE": "1"}), GOOD)
    assert "torchweft_strategies" in capsys.readouterr().err


@pytest.mark.parametrize("environ", [{}, {"TORCHWEFT_TRACE": ""}, {"TORCHWEFT_TRACE": "0"}])
def test_nothing_is_traced_otherwise(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    add(Manager(environ), GOOD)
    assert capsys.readouterr().err == ""


def test_a_value_of_trace_that_means_nothing_is_an_error() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^the environment variable TORCHWEFT_TRACE is 'yes'; it takes 1 or 0$",
    ):
        Manager({"TORCHWEFT_TRACE": "yes"})
