from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest

import torchweft
from torchweft import hookspecs
from torchweft.manager import Manager
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
