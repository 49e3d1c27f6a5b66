from __future__ import annotations

from typing import Any

import pytest

from torchweft.faults import faults
from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, Spec, StrategySpec


def strategy(**fields: Any) -> StrategySpec:
    return StrategySpec(**{"name": "acme", "target": "acme:Acme", **fields})


@pytest.mark.parametrize(
    "spec",
    [
        strategy(),
        strategy(exclusive=("precision", "launcher"), devices=("cuda",), priority=-1),
        AcceleratorSpec(name="tpu", target="a:B", device="xla", default_devices="all"),
        PrecisionSpec(name="bf16-mixed", target="a:B", strategies=("acme",), aliases=("16",)),
        LauncherSpec(name="ray", target="a:B", detect="a.b:c", processes="many"),
    ],
)
def test_a_sound_spec(spec: Spec) -> None:
    assert faults(spec) == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (strategy(aliases="gpu"), "aliases='gpu' is not of the type tuple[str, ...]"),
        (strategy(devices=["cuda"]), "devices=['cuda'] is not of the type tuple[str, ...]"),
        (
            strategy(processes="many"),
            "processes='many' is not of the type 'device' | 'node' | 'one'",
        ),
        (strategy(priority="high"), "priority='high' is not of the type int | None"),
        (strategy(target="acme.Acme"), "target='acme.Acme' is not of the form"),
        (strategy(target=""), "target='' is not of the form 'package.module:attribute'"),
        (strategy(probe="acme"), "probe='acme' is not of the form 'package.module:attribute'"),
        (
            LauncherSpec(name="ray", target="a:B", detect="a"),
            "detect='a' is not of the form 'package.module:attribute'",
        ),
        (strategy(name="FSDP"), "nobody can ask for the name 'FSDP': names are lower case"),
        (strategy(name=""), "nobody can ask for the name ''"),
        (strategy(aliases=("a:b",)), "nobody can ask for the name 'a:b'"),
        (strategy(aliases=("auto",)), "nobody can ask for the name 'auto'"),
        (
            strategy(exclusive=("accelerator",)),
            "exclusive names 'accelerator', but after the strategy comes precision, launcher",
        ),
        (
            LauncherSpec(name="ray", target="a:B", exclusive=("precision",)),
            "exclusive names 'precision', but after the launcher comes nothing",
        ),
        (strategy(strategies=("ddp",)), "the strategy is chosen no later"),
        (
            AcceleratorSpec(name="tpu", target="a:B", device="xla", devices=("xla",)),
            "an accelerator serves its own device",
        ),
    ],
)
def test_what_makes_a_spec_unusable(spec: Spec, words: str) -> None:
    found = faults(spec)
    assert len(found) == 1
    assert words in found[0]


def test_every_fault_is_told_at_once() -> None:
    assert len(faults(strategy(name="A", target="b", exclusive=("strategy",)))) == 3
