from __future__ import annotations

import dataclasses
import pickle

import pytest

from torchweft.errors import BrokenPlugin
from torchweft.specs import (
    KINDS,
    AcceleratorSpec,
    Availability,
    Detection,
    LauncherSpec,
    PrecisionSpec,
    Preset,
    Spec,
    StrategySpec,
    is_target,
    load_target,
)

DDP = StrategySpec(
    name="ddp",
    target="m:DDP",
    aliases=("data_parallel",),
    devices=("cuda", "cpu"),
    presets=(
        Preset(alias="ddp_spawn", launcher="spawn"),
        Preset(alias="ddp_unused", options={"find_unused_parameters": True}),
    ),
)
SPECS = [
    AcceleratorSpec(name="cuda", target="m:CUDA", device="cuda", aliases=("gpu",)),
    DDP,
    PrecisionSpec(name="32-true", target="m:Full"),
    LauncherSpec(name="spawn", target="m:Spawn", probe="m:probe", detect="m:detect"),
]
RECORDS = [*SPECS, Availability(ok=True), Detection(reason="torchrun started this process")]


def test_each_kind_has_one_spec() -> None:
    assert tuple(spec.kind for spec in SPECS) == KINDS


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_are_plain_values(record: Spec) -> None:
    assert pickle.loads(pickle.dumps(record)) == record
    assert hash(record) == hash(dataclasses.replace(record))
    assert not hasattr(record, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, dataclasses.fields(record)[0].name, "other")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_take_keywords_only(record: Spec) -> None:
    with pytest.raises(TypeError, match="positional"):
        type(record)("cpu")  # type: ignore[call-arg]


def test_presets_are_names_too() -> None:
    assert DDP.names() == ("ddp", "data_parallel", "ddp_spawn", "ddp_unused")
    assert SPECS[0].names() == ("cuda", "gpu")


def test_a_preset_is_found_by_its_alias_alone() -> None:
    assert DDP.preset("ddp_spawn") == Preset(alias="ddp_spawn", launcher="spawn")
    assert DDP.preset("ddp") is None
    assert DDP.preset("data_parallel") is None
    assert SPECS[0].preset("gpu") is None


def test_an_accelerator_competes_for_its_own_device() -> None:
    assert SPECS[0].served_devices() == ("cuda",)
    assert DDP.served_devices() == ("cuda", "cpu")
    assert SPECS[2].served_devices() == ()


def test_targets_by_field_without_the_empty_ones() -> None:
    assert DDP.targets() == {"target": "m:DDP"}
    assert SPECS[3].targets() == {"target": "m:Spawn", "probe": "m:probe", "detect": "m:detect"}


@pytest.mark.parametrize("text", ["os:path", "os.path:join", "a.b_c.d1:Class.method"])
def test_targets(text: str) -> None:
    assert is_target(text)


@pytest.mark.parametrize(
    "text",
    ["", "os", "os:", ":path", "os.path.join", "os..path:join", "os:path:join", "1a:b", "a b:c"],
)
def test_what_is_no_target(text: str) -> None:
    assert not is_target(text)
    with pytest.raises(
        BrokenPlugin,
        match=rf"^acme 0\.1 declares the target '{text}', which is not of the form "
        r"'package\.module:attribute'$",
    ):
        load_target(text, "acme 0.1")


def test_a_target_is_loaded() -> None:
    import os.path

    assert load_target("os.path:join", "acme 0.1") is os.path.join
    assert load_target("os:path.join", "acme 0.1") is os.path.join


def test_a_target_that_cannot_be_loaded_names_the_plugin_and_the_error() -> None:
    with pytest.raises(
        BrokenPlugin,
        match=r"^acme 0\.1 declares the target 'acme_gone\.x:Y', which cannot be loaded: "
        r"ModuleNotFoundError: No module named 'acme_gone'$",
    ):
        load_target("acme_gone.x:Y", "acme 0.1")
    with pytest.raises(BrokenPlugin, match=r"AttributeError: module 'os' has no attribute 'Gone'"):
        load_target("os:Gone", "acme 0.1")


def test_a_target_that_exits_on_import_is_a_broken_plugin(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    (tmp_path / "exits_on_import.py").write_text("import sys; sys.exit('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BrokenPlugin, match=r"cannot be loaded: SystemExit: no licence$"):
        load_target("exits_on_import:Y", "acme 0.1")
