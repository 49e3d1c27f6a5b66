from __future__ import annotations

import dataclasses
import inspect
import re
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pluggy
import pytest
import torch
from tests.core.fresh_python import python
from torch import nn

import torchweft
from torchweft import Fabric, hookspecs, specs
from torchweft.api import Accelerator, Launcher, Precision, RankInfo, RunPlan, Strategy
from torchweft.discovery import Found
from torchweft.errors import IncompatiblePlan
from torchweft.manager import Declared, Manager
from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, StrategySpec

HOOKS = [name for name in hookspecs.__all__ if name.startswith("torchweft_")]

#: What an implementation of each hook may return.
ANSWERS: dict[str, Any] = {
    "torchweft_accelerators": [AcceleratorSpec(name="npu", target="acme:NPU", device="npu")],
    "torchweft_strategies": [StrategySpec(name="mean", target="acme:Mean")],
    "torchweft_precisions": [PrecisionSpec(name="tf32", target="acme:TF32")],
    "torchweft_launchers": [LauncherSpec(name="pool", target="acme:Pool")],
    "torchweft_check_plan": ["acme needs two nodes; write num_nodes=2"],
    "torchweft_worker_context": nullcontext("acme"),
}


def plugin(hook: str, answer: Any) -> ModuleType:
    """A module with one hook, its arguments as the contract has them."""
    module = ModuleType("acme_hooks")
    parameters = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
    code = f"@hookimpl\ndef {hook}({parameters}):\n    return answer\n"
    vars(module).update(hookimpl=torchweft.hookimpl, answer=answer)
    exec(code, vars(module))
    return module


def test_the_names_of_the_contract() -> None:
    assert hookspecs.NAME == "torchweft"
    assert hookspecs.hookimpl.project_name == hookspecs.NAME
    assert torchweft.hookimpl is hookspecs.hookimpl
    assert sorted(ANSWERS) == sorted(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_no_hook_stops_the_others(hook: str) -> None:
    assert not getattr(hookspecs, hook).torchweft_spec["firstresult"]


@pytest.mark.parametrize("hook", HOOKS)
def test_what_an_implementation_returns_arrives(hook: str) -> None:
    manager = Manager({})
    anything: Any = object()
    declared = manager.add_module(plugin(hook, ANSWERS[hook]))
    arrived = [
        *declared.specs,
        *(sentence.partition(" (says ")[0] for sentence in manager.objections(anything)),
        *manager.worker_contexts(anything),
    ]
    assert arrived == (ANSWERS[hook] if isinstance(ANSWERS[hook], list) else [ANSWERS[hook]])


@pytest.mark.parametrize("hook", HOOKS)
def test_an_implementation_that_returns_none_is_refused(hook: str) -> None:
    manager = Manager({})
    instead = (
        r"contextlib\.nullcontext\(\)" if hook == "torchweft_worker_context" else "an empty list"
    )
    anything: Any = object()

    def ask() -> None:
        manager.add_module(plugin(hook, None))
        manager.objections(anything)
        manager.worker_contexts(anything)

    with pytest.raises(
        torchweft.TorchweftError,
        match=rf"{hook}\(\) of the module 'acme_hooks' returned None; a hook that has nothing to "
        rf"give returns {instead}$",
    ):
        ask()


# -- each hook, by its name, through a Fabric --------------------------------------------------


class Quiet(Accelerator):
    """The processor under another name."""

    host_memory = True

    def bind(self, rank: Any, devices: Any) -> torch.device:
        return torch.device("cpu")


class Doubling(Strategy):
    """Gradients of twice the loss, so that it is seen to be the one at work."""

    def backward(self, loss: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(2 * loss, module, *args, **kwargs)


class Negated(Precision):
    """Outputs with the other sign."""

    def convert_output(self, data: Any) -> Any:
        return -data


class Counting(Launcher):
    """One process, with a note of what it was asked to run."""

    def launch(
        self, plan: RunPlan, function: Any, arguments: Any, *, fork_hazard: Any = lambda: None
    ) -> Any:
        return plan.launcher.name, function(*arguments)

    def rank(self, environ: Any) -> Any:
        return RankInfo()


def hooks(source: str) -> ModuleType:
    """A module of hooks; the classes above are its targets."""
    module = ModuleType("acme_hooks")
    exec(
        "from torchweft.hookspecs import hookimpl\nfrom torchweft.specs import *\n" + source,
        vars(module),
    )
    return module


def one(kind: str, arguments: str) -> ModuleType:
    """A module that declares one spec of a kind."""
    hook = "strategies" if kind == "Strategy" else f"{kind.lower()}s"
    code = f"@hookimpl\ndef torchweft_{hook}(): return [{kind}Spec({arguments})]"
    return hooks(code)


def test_torchweft_accelerators_gives_a_process_its_device() -> None:
    module = one("Accelerator", f"name='quiet', device='cpu', target='{__name__}:Quiet'")
    fabric = Fabric(accelerator="quiet", plugins=module)
    assert type(fabric.accelerator) is Quiet
    assert fabric.device == torch.device("cpu")


def test_torchweft_strategies_does_the_step() -> None:
    module = one("Strategy", f"name='doubling', target='{__name__}:Doubling'")
    fabric = Fabric(accelerator="cpu", strategy="doubling", plugins=module)
    model = fabric.setup(nn.Linear(1, 1, bias=False))
    fabric.backward(model(torch.ones(1, 1)).sum())
    assert model.weight.grad.item() == 2


def test_torchweft_precisions_is_around_the_forward() -> None:
    module = one("Precision", f"name='negated', target='{__name__}:Negated'")
    fabric = Fabric(accelerator="cpu", precision="negated", plugins=module)
    assert fabric.setup(nn.Identity())(torch.ones(1)).item() == -1


def test_torchweft_launchers_makes_the_processes() -> None:
    module = one("Launcher", f"name='counting', target='{__name__}:Counting'")
    fabric = Fabric(accelerator="cpu", launcher="counting", plugins=module)
    assert fabric.launch(lambda fabric: fabric.world_size) == ("counting", 1)


def test_torchweft_check_plan_is_asked_about_the_finished_plan_and_all_objections_are_raised() -> (
    None
):
    source = """
@hookimpl
def torchweft_check_plan(plan):
    assert plan.launcher.name == "inline" and plan.topology.world_size == 1
    return [f"not on {plan.accelerator.name}", f"not in {plan.precision.name}"]
"""
    other = ModuleType("other_hooks")
    vars(other).update(vars(hooks(source)))
    vars(other)["__name__"] = "other_hooks"
    with pytest.raises(
        IncompatiblePlan,
        match=r"^not on cpu \(says the module 'acme_hooks'\); not in 32-true \(says the module "
        r"'acme_hooks'\); not on cpu \(says the module 'other_hooks'\); not in 32-true "
        r"\(says the module 'other_hooks'\)$",
    ):
        Fabric(accelerator="cpu", plugins=[hooks(source), other])


CONTEXTS = """
from contextlib import contextmanager
from types import ModuleType
from torchweft import Fabric, hookimpl

@contextmanager
def context(name, run):
    print(name, "begins in rank", run.rank.rank, "on", run.device)
    try:
        yield
    except ValueError as error:
        print(name, "hears of:", error)
        raise

modules = []
for name in ("first", "second"):
    module = ModuleType(name)
    vars(module).update(hookimpl=hookimpl, context=context)
    hook = "def torchweft_worker_context(run): return context(__name__, run)"
    exec(f"@hookimpl\\n{hook}", vars(module))
    modules.append(module)
fabric = Fabric(accelerator="cpu", plugins=modules)
fabric.launch()
raise ValueError("enough")
"""


def test_torchweft_worker_context_is_around_user_code_and_hears_of_its_end() -> None:
    done = python(CONTEXTS)
    assert done.stdout.splitlines() == [
        "first begins in rank 0 on cpu",
        "second begins in rank 0 on cpu",
        "second hears of: enough",
        "first hears of: enough",
    ]
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ValueError: enough")


# -- the contract as it grows and shrinks ------------------------------------------------------


def declare(source: str) -> Declared:
    """What became of a module of hooks when it was registered."""
    found = Found(name="acme", distribution="torchweft-acme", version="0.1", module=hooks(source))
    return Manager({}).add(found)


@pytest.mark.parametrize(
    "implementation",
    ["torchweft_check_plan()", "torchweft_check_plan(plan)", "torchweft_check_plan(plan=None)"],
)
def test_an_implementation_may_take_fewer_arguments(implementation: str) -> None:
    manager = Manager({})
    manager.add_module(hooks(f"@hookimpl\ndef {implementation}: return ['no']"))
    anything: Any = object()
    assert manager.objections(anything) == ["no (says the module 'acme_hooks')"]


def test_a_hook_of_a_newer_core_is_an_error_unless_it_is_optional() -> None:
    newer = "def torchweft_samplers(plan): return []"
    assert "'torchweft_samplers'" in declare(f"@hookimpl\n{newer}").error
    assert declare(f"@hookimpl(optionalhook=True)\n{newer}").error == ""


def test_a_field_of_a_newer_core_is_an_error() -> None:
    spec = "StrategySpec(name='a', target='b:c', new=1)"
    declared = declare(f"@hookimpl\ndef torchweft_strategies(): return [{spec}]")
    assert (declared.specs, "'new'" in declared.error) == ((), True)


def test_only_what_a_record_cannot_be_without_has_no_default() -> None:
    required = {
        (cls.__name__, field.name)
        for cls in vars(specs).values()
        if dataclasses.is_dataclass(cls)
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    kinds = ("Spec", "AcceleratorSpec", "StrategySpec", "PrecisionSpec", "LauncherSpec")
    assert required == {
        *((kind, field) for kind in kinds for field in ("name", "target")),
        ("AcceleratorSpec", "device"),
        ("Availability", "ok"),
        ("Detection", "reason"),
        ("Preset", "alias"),
    }


class Deprecating:
    """A core in which one hook, and one argument of another, are on their way out."""

    mark = pluggy.HookspecMarker(hookspecs.NAME)

    @mark(warn_on_impl=DeprecationWarning("torchweft_old goes with 0.4; use torchweft_new"))
    def torchweft_old(self) -> Any: ...

    @mark(
        warn_on_impl_args={
            "config": DeprecationWarning("config of torchweft_other goes with 0.4; use plan")
        }
    )
    def torchweft_other(self, plan: Any, config: Any) -> Any: ...


@pytest.mark.parametrize(
    ("implementation", "words"),
    [
        ("torchweft_old()", "torchweft_old goes with 0.4; use torchweft_new"),
        ("torchweft_other(config)", "config of torchweft_other goes with 0.4; use plan"),
    ],
)
def test_a_deprecated_hook_or_argument_warns_whoever_implements_it(
    implementation: str, words: str
) -> None:
    manager = pluggy.PluginManager(hookspecs.NAME)
    manager.add_hookspecs(Deprecating)
    module = hooks(f"@hookimpl\ndef {implementation}: return 3")
    with pytest.warns(DeprecationWarning, match=f"^{re.escape(words)}$") as told:
        manager.register(module)
    # It points at the plugin's own line.
    assert told[0].filename == "<string>"
    name = implementation.partition("(")[0]
    caller = getattr(manager.hook, name)
    assert caller(**({} if name == "torchweft_old" else {"plan": 1, "config": 2})) == [3]


def test_an_implementation_without_the_deprecated_argument_warns_nobody() -> None:
    manager = pluggy.PluginManager(hookspecs.NAME)
    manager.add_hookspecs(Deprecating)
    manager.register(hooks("@hookimpl\ndef torchweft_other(plan): return plan"))
    assert manager.hook.torchweft_other(plan=1, config=2) == [1]


def test_nothing_is_deprecated_now() -> None:
    for name in HOOKS:
        options = getattr(hookspecs, name).torchweft_spec
        assert (options["warn_on_impl"], options["warn_on_impl_args"]) == (None, None)
