from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from torchweft.api import Precision
from torchweft.errors import BrokenPlugin, IncompatiblePlan, InvalidRequest, RankFailed
from torchweft.fabric import Fabric
from torchweft.testing import HookRecorder
from torchweft.testing.interpreter import fresh_interpreter

HOOKS = """
from contextlib import nullcontext
from torchweft.hookspecs import hookimpl
from torchweft.specs import PrecisionSpec

@hookimpl
def torchweft_precisions():
    where = "torchweft.builtin.precisions:Full"
    return [PrecisionSpec(name="mine", target=where, summary="mine")]

@hookimpl
def torchweft_check_plan(plan):
    return [] if plan.precision.name != "16-true" else ["write precision='mine'"]

@hookimpl
def torchweft_worker_context():
    return nullcontext("around")
"""


@pytest.fixture
def hook_recorder() -> HookRecorder:
    return HookRecorder()


@pytest.fixture
def my_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that other processes can import too."""
    (tmp_path / "my_hooks.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    import my_hooks

    yield my_hooks
    del sys.modules["my_hooks"]


def hooks(source: str) -> ModuleType:
    module = ModuleType("other_hooks")
    exec(f"from torchweft.hookspecs import hookimpl\n@hookimpl\ndef {source}", vars(module))
    return module


def test_every_call_from_the_loading_on(hook_recorder: HookRecorder, my_hooks: ModuleType) -> None:
    recorded = hook_recorder(my_hooks)
    assert type(recorded.fabric.accelerator).__name__ == "CPU"
    assert (recorded.calls[0].plugin, recorded.calls[0].hook) == (
        "builtin",
        "torchweft_accelerators",
    )
    declared, checked = (call for call in recorded.calls if call.plugin == "my_hooks")
    assert (declared.hook, checked.hook) == ("torchweft_precisions", "torchweft_check_plan")
    assert recorded.calls[-1] is checked
    assert (declared.arguments, [spec.name for spec in declared.result]) == ({}, ["mine"])
    assert (checked.arguments, checked.result) == ({"plan": recorded.fabric.plan}, [])
    assert declared.provider == "the module 'my_hooks'"


def test_what_is_called_in_a_rank(hook_recorder: HookRecorder, my_hooks: ModuleType) -> None:
    recorded = hook_recorder(my_hooks)
    assert recorded.of("torchweft_worker_context") == []
    assert recorded.fabric.launch(_runs) == ["torchweft_worker_context"]
    (call,) = recorded.of("torchweft_worker_context")
    assert isinstance(call.result, nullcontext)
    assert call.arguments["run"].plan == recorded.fabric.plan
    assert hook_recorder.calls == recorded.calls


def _runs(fabric: Any) -> list[str]:
    (heard, _) = fabric._heard
    return [call.hook for call in heard if "run" in call.arguments]


def test_a_rank_in_another_process_has_its_own_calls(
    hook_recorder: HookRecorder, my_hooks: ModuleType
) -> None:
    recorded = hook_recorder(my_hooks, launcher="spawn")
    before = list(recorded.calls)
    assert recorded.fabric.launch(_runs) == ["torchweft_worker_context"]
    assert recorded.calls == before


def test_one_hook_and_one_plugin(hook_recorder: HookRecorder, my_hooks: ModuleType) -> None:
    recorded = hook_recorder(my_hooks)
    assert recorded.of() == recorded.calls
    assert {call.plugin for call in recorded.of("torchweft_precisions")} >= {"builtin", "my_hooks"}
    assert [call.hook for call in recorded.of(plugin="my_hooks")] == [
        "torchweft_precisions",
        "torchweft_check_plan",
    ]
    (call,) = recorded.of("torchweft_precisions", "my_hooks")
    assert call.plugin == "my_hooks"


def test_a_misspelt_hook_is_an_error_and_not_an_empty_list(hook_recorder: HookRecorder) -> None:
    recorded = hook_recorder()
    with pytest.raises(
        InvalidRequest,
        match=r"^no hook is called 'torchweft_startegies', so that nothing calls it; "
        r"did you mean 'torchweft_strategies'\?$",
    ):
        recorded.of("torchweft_startegies")


def test_a_fabric_that_cannot_be_made_has_its_calls_in_the_recorder(
    hook_recorder: HookRecorder, my_hooks: ModuleType
) -> None:
    hook_recorder(my_hooks)
    with pytest.raises(IncompatiblePlan, match=r"^write precision='mine' \(says "):
        hook_recorder(my_hooks, precision="16-true")
    first, second = hook_recorder.of("torchweft_check_plan", "my_hooks")
    assert (first.result, second.result) == ([], ["write precision='mine'"])


def test_a_hook_that_raises_is_recorded_with_its_error(hook_recorder: HookRecorder) -> None:
    with pytest.raises(BrokenPlugin, match="failed: KeyError: 'x'"):
        hook_recorder(hooks("torchweft_check_plan(plan): raise KeyError('x')"))
    call = hook_recorder.of("torchweft_check_plan")[-1]
    assert (repr(call.error), call.result) == ("KeyError('x')", None)
    recorded = hook_recorder(hooks("torchweft_worker_context(run): raise OSError('y')"))
    with pytest.raises((BrokenPlugin, RankFailed), match="failed: OSError: y"):
        recorded.fabric.launch(_runs)
    (call,) = recorded.of("torchweft_worker_context")
    assert repr(call.error) == "OSError('y')"


class Own(Precision):
    """A live object beside the modules."""


@pytest.mark.parametrize("several", [False, True])
def test_other_arguments_are_those_of_fabric(
    hook_recorder: HookRecorder, my_hooks: ModuleType, several: bool
) -> None:
    own = Own()
    recorded = hook_recorder(my_hooks, accelerator="auto", plugins=[own] if several else own)
    assert isinstance(recorded.fabric, Fabric)
    assert recorded.fabric.precision is own
    assert recorded.of(plugin="my_hooks") != []


def test_the_call_of_launch_alone_is_recorded_too(my_hooks: ModuleType) -> None:
    done = fresh_interpreter(
        """
        import my_hooks
        from torchweft.testing import HookRecorder
        recorded = HookRecorder()(my_hooks)
        recorded.fabric.launch()
        (call,) = recorded.of("torchweft_worker_context")
        print(call.arguments["run"].device, call.result.enter_result)
        """
    )
    assert (done.status, done.out) == (0, "cpu around\n"), done.err
