from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from torchweft.misfits import launcher_misfits, misfits, strategy_misfits
from torchweft.plan import Topology
from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, StrategySpec

TPU = AcceleratorSpec(name="tpu", target="a:B", device="xla")
DDP = StrategySpec(name="ddp", target="a:B")
FULL = PrecisionSpec(name="32-true", target="a:B")
SCRIPT = LauncherSpec(name="script", target="a:B")
ONE, TWO = Topology(), Topology(processes_per_node=2, devices=(0, 1))


@pytest.mark.parametrize(
    ("served", "sentences"),
    [
        ({}, []),
        ({"devices": ("xla",), "strategies": ("ddp",)}, []),
        ({"devices": ("cuda", "cpu")}, ["it does not serve device 'xla', only 'cuda', 'cpu'"]),
        ({"strategies": ("fsdp",)}, ["it does not serve strategy 'ddp', only 'fsdp'"]),
        # An accelerator's own name is not what a spec serves; its device is.
        ({"devices": ("tpu",)}, ["it does not serve device 'xla', only 'tpu'"]),
        (
            {"devices": ("cpu",), "strategies": ("fsdp",)},
            [
                "it does not serve device 'xla', only 'cpu'",
                "it does not serve strategy 'ddp', only 'fsdp'",
            ],
        ),
    ],
)
def test_what_a_spec_serves(served: dict[str, Any], sentences: list[str]) -> None:
    assert misfits(replace(FULL, **served), TPU, DDP) == sentences


def test_the_strategy_does_not_matter_before_it_is_decided() -> None:
    assert misfits(replace(FULL, strategies=("fsdp",)), TPU) == []


def test_who_is_exclusive_takes_what_names_it() -> None:
    tpu = replace(TPU, exclusive=("precision",))
    ddp = replace(DDP, exclusive=("precision", "launcher"))
    assert misfits(FULL, tpu, ddp) == [
        "accelerator 'tpu' takes only a precision made for it",
        "strategy 'ddp' takes only a precision made for it",
    ]
    assert misfits(SCRIPT, tpu, ddp) == ["strategy 'ddp' takes only a launcher made for it"]
    assert misfits(replace(FULL, devices=("xla",), strategies=("ddp",)), tpu, ddp) == []


@pytest.mark.parametrize(
    ("topology", "devices"),
    [(ONE, 1), (TWO, 2), (replace(ONE, num_nodes=3), 3), (replace(TWO, num_nodes=(1, 4)), 8)],
)
def test_a_strategy_of_one_device(topology: Topology, devices: int) -> None:
    alone = replace(DDP, processes="one")
    assert strategy_misfits(DDP, TPU, topology) == []
    assert strategy_misfits(alone, TPU, topology) == (
        [f"it runs one process on one device, and there are {devices} to use"] * (devices > 1)
    )


@pytest.mark.parametrize(
    ("launcher", "topology", "sentences"),
    [
        ({}, ONE, []),
        ({}, TWO, []),
        ({"processes": "one"}, ONE, []),
        ({"processes": "one"}, TWO, ["it makes one process, and the plan has 2"]),
        ({"processes": "many"}, TWO, []),
        ({"processes": "many"}, ONE, ["the plan has one process, which needs no launcher"]),
        ({"nodes": "any"}, replace(TWO, num_nodes=2), []),
        (
            {},
            replace(TWO, num_nodes=(1, 2)),
            [
                (
                    "it starts processes on this node alone, and the plan has 2 nodes; start the "
                    "script with 'torchweft run --num-nodes … --devices …'"
                )
            ],
        ),
        (
            {"outside": True},
            TWO,
            ["it starts the script from outside, and did not start this one"],
        ),
        (
            {"outside": True, "start": "srun python train.py"},
            TWO,
            [
                (
                    "it starts the script from outside, as 'srun python train.py' does, and did "
                    "not start this one"
                )
            ],
        ),
    ],
)
def test_launchers(launcher: dict[str, Any], topology: Topology, sentences: list[str]) -> None:
    spec = replace(SCRIPT, **launcher)
    assert launcher_misfits(spec, TPU, DDP, topology, detected=None) == sentences


def test_a_launcher_outside_that_did_start_this_process() -> None:
    spec = replace(SCRIPT, outside=True)
    assert launcher_misfits(spec, TPU, DDP, TWO, detected=spec) == []
    assert launcher_misfits(spec, TPU, DDP, TWO, detected=SCRIPT) != []
