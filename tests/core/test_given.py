"""Objects that the user made, in place of names."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torchweft import Fabric
from torchweft.api import Accelerator, Launcher, Precision, Strategy
from torchweft.builtin.cpu import CPU
from torchweft.builtin.launchers.function import Fork, Spawn
from torchweft.builtin.launchers.inline import Inline
from torchweft.builtin.precisions import BFloat16Mixed, Double
from torchweft.builtin.single_device import SingleDevice
from torchweft.errors import BrokenPlugin, InvalidRequest, TorchweftError, UnknownName
from torchweft.given import kind_of, sort_plugins


class Mine(SingleDevice):
    """A strategy of the user's own, made from a known one."""


class Alien(Strategy):
    """A strategy that nothing knows.

    With more to say.
    """

    processes = "one"


class Named(Strategy):
    """Says its own name."""

    name = "named"
    devices = ("cpu",)
    processes = "one"


def decided(fabric: Fabric, kind: str) -> tuple[str, str]:
    decision = next(d for d in fabric.plan.decisions if d.kind == kind)
    return decision.spec.name, decision.provider


# -- which spec ----------------------------------------------------------------------------------


def test_kinds() -> None:
    assert kind_of(CPU()) == "accelerator"
    assert kind_of(Mine()) == "strategy"
    assert kind_of(Double()) == "precision"
    assert kind_of(Inline()) == "launcher"
    assert kind_of("ddp") is None
    assert kind_of(Mine) is None


def test_an_object_takes_the_spec_of_its_class() -> None:
    fabric = Fabric(
        accelerator=CPU(), strategy=SingleDevice(), precision=BFloat16Mixed(), launcher=Inline()
    )
    names = [decided(fabric, d.kind)[0] for d in fabric.plan.decisions]
    assert names == ["cpu", "single_device", "bf16-mixed", "inline"]
    assert all("torchweft" in d.provider for d in fabric.plan.decisions)


def test_the_very_object_is_used() -> None:
    strategy, precision = Mine(), Double()
    fabric = Fabric(accelerator="cpu", strategy=strategy, plugins=[precision])
    assert fabric.strategy is strategy
    assert fabric.precision is precision


def test_an_object_takes_the_spec_of_the_nearest_base() -> None:
    assert decided(Fabric(accelerator="cpu", strategy=Mine()), "strategy")[0] == "single_device"


def test_an_object_of_nobodys_class_is_described_by_its_class() -> None:
    fabric = Fabric(accelerator="cpu", strategy=Alien())
    assert decided(fabric, "strategy") == ("alien", "the class Alien")
    assert fabric.plan.strategy.summary == "A strategy that nothing knows."
    assert fabric.plan.strategy.target.endswith(":Alien")
    named = Fabric(accelerator="cpu", strategy=Named())
    assert named.plan.strategy.name == "named"
    assert named.plan.strategy.devices == ("cpu",)


def test_a_class_inside_a_function_has_a_plain_name() -> None:
    class Local(Precision):
        pass

    class Board(Accelerator):
        device_type = "cpu"

        def bind(self, rank: Any, devices: Any) -> torch.device:
            return torch.device("cpu")

    class Caller(Launcher):
        def launch(self, plan: Any, function: Any, arguments: Any, **more: Any) -> Any:
            return function(*arguments) if function else None

    fabric = Fabric(accelerator=Board(), precision=Local(), launcher=Caller(), devices=1)
    assert decided(fabric, "precision")[0] == "local"
    assert decided(fabric, "launcher")[0] == "caller"
    assert fabric.plan.accelerator.device == "cpu"


def test_a_target_may_name_a_class_by_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = ModuleType("shop_window")
    shop.Alien = Alien  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop_window", shop)
    hooks = module_of(
        "shop_hooks",
        "from torchweft.specs import StrategySpec\n"
        "from torchweft.hookspecs import hookimpl\n"
        "@hookimpl\n"
        "def torchweft_strategies():\n"
        "    return [StrategySpec(name='on_show', target='shop_window:Alien', processes='one')]\n",
    )
    fabric = Fabric(accelerator="cpu", strategy=Alien(), plugins=hooks)
    assert decided(fabric, "strategy")[0] == "on_show"


# -- plugins= ------------------------------------------------------------------------------------


def module_of(name: str, source: str) -> ModuleType:
    module = ModuleType(name)
    exec(source, module.__dict__)
    return module


HOOKS = """
from torchweft.hookspecs import hookimpl
from torchweft.specs import PrecisionSpec

@hookimpl
def torchweft_precisions():
    return [PrecisionSpec(name="mine", target="torchweft.builtin.precisions:Double")]
"""


def test_plugins_are_sorted_by_what_they_are() -> None:
    precision, launcher, module = Double(), Inline(), ModuleType("hooks")
    assert sort_plugins([precision, module, None, launcher]) == (
        {"precision": precision, "launcher": launcher},
        [module],
    )
    assert sort_plugins(None) == ({}, [])
    assert sort_plugins(precision) == ({"precision": precision}, [])
    assert sort_plugins((module,)) == ({}, [module])


def test_precision_and_launcher_are_taken_from_plugins() -> None:
    fabric = Fabric(accelerator="cpu", plugins=[Double(), Inline()])
    assert fabric.plan.precision.name == "64-true"
    assert fabric.plan.launcher.name == "inline"


def test_hooks_are_known_to_one_fabric_alone() -> None:
    hooks = module_of("my_hooks", HOOKS)
    fabric = Fabric(accelerator="cpu", precision="mine", plugins=[hooks])
    assert decided(fabric, "precision") == ("mine", "the module 'my_hooks'")
    with pytest.raises(UnknownName, match="no precision is called 'mine'"):
        Fabric(accelerator="cpu", precision="mine")


def test_hooks_that_are_broken_are_an_error_at_once() -> None:
    broken = module_of("my_hooks", HOOKS.replace("def torchweft_precisions", "def torchweft_typo"))
    with pytest.raises(BrokenPlugin, match="torchweft_typo"):
        Fabric(accelerator="cpu", plugins=[broken])


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "importable_hooks.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    import importable_hooks

    yield importable_hooks
    sys.modules.pop("importable_hooks", None)


def test_a_fresh_process_imports_the_hooks_by_name(importable: ModuleType) -> None:
    fabric = Fabric(accelerator="cpu", precision="mine", plugins=importable)
    sent = pickle.dumps(fabric)
    sys.modules.pop("importable_hooks")
    received = pickle.loads(sent)
    assert received.plan == fabric.plan
    assert isinstance(received.precision, Double)


def test_hooks_that_no_fresh_process_can_import_are_named() -> None:
    fabric = Fabric(accelerator="cpu", plugins=module_of("nowhere", HOOKS), launcher="spawn")
    with pytest.raises(
        TorchweftError,
        match=r"fresh processes cannot be given the module 'nowhere' of plugins=, which cannot be "
        r"pickled: 'nowhere' cannot be imported by that name",
    ):
        fabric.launch(print)


def test_an_object_that_cannot_be_pickled_is_named() -> None:
    strategy = Mine()
    strategy.stuck = lambda: None  # type: ignore[attr-defined]
    fabric = Fabric(accelerator="cpu", strategy=strategy, launcher="spawn")
    with pytest.raises(
        TorchweftError,
        match=r"cannot be given the strategy Mine, .* or use launcher='fork', which pickles "
        r"nothing",
    ):
        fabric.launch(print)


# -- what contradicts itself ---------------------------------------------------------------------


def test_a_precision_and_a_precision_object_are_one_too_many() -> None:
    for value, words in (("bf16-mixed", "'bf16-mixed'"), (Double(), "Double()")):
        with pytest.raises(InvalidRequest) as caught:
            Fabric(accelerator="cpu", precision=value, plugins=[BFloat16Mixed()])
        assert str(caught.value) == (
            f"precision={words} and a BFloat16Mixed in plugins= were both given; leave one of "
            "them out"
        )


def test_a_launcher_and_a_launcher_object_are_one_too_many() -> None:
    with pytest.raises(
        InvalidRequest, match=r"launcher='spawn' and a Fork in plugins= were both given"
    ):
        Fabric(accelerator="cpu", launcher="spawn", plugins=[Fork()])
    assert Fabric(accelerator="cpu", launcher="auto", plugins=[Fork()]).plan.launcher.name == "fork"


def test_one_object_of_a_kind() -> None:
    with pytest.raises(
        InvalidRequest, match=r"plugins= has two of kind launcher: Fork and Spawn; keep one"
    ):
        Fabric(accelerator="cpu", plugins=[Fork(), Spawn()])


@pytest.mark.parametrize("value", ["ddp", 3, Mine, object()])
def test_what_is_no_plugin_is_an_error(value: Any) -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"it takes live Precision, Launcher, Strategy or Accelerator objects and modules of "
        r"hooks",
    ):
        Fabric(accelerator="cpu", plugins=[value])


def test_an_object_in_the_wrong_place_is_an_error() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"strategy= was given Double\(\), which is a precision; pass it as precision=",
    ):
        Fabric(accelerator="cpu", strategy=Double())


def test_a_class_where_an_object_belongs_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match=r"it takes a name, or an instance of a strategy"):
        Fabric(accelerator="cpu", strategy=Mine)
