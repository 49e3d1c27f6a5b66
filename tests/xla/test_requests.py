"""What is asked for and cannot be, each with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.xla.scripts import fails, script, told
from torchweft import Fabric
from torchweft.errors import IncompatiblePlan, NotAvailable, TorchweftError


@pytest.fixture(autouse=True)
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("CPU_NUM_DEVICES", "4")


def plan(**asked: Any) -> Any:
    return Fabric(**asked).plan


def refused(error: type[TorchweftError] = IncompatiblePlan, **asked: Any) -> str:
    with pytest.raises(error) as caught:
        Fabric(**asked)
    return str(caught.value)


@pytest.mark.parametrize(
    ("asked", "strategy", "devices"),
    [
        ({}, "xla", (0, 1, 2, 3)),
        ({"accelerator": "tpu"}, "xla", (0, 1, 2, 3)),
        ({"accelerator": "xla", "devices": "auto"}, "xla", (0, 1, 2, 3)),
        ({"accelerator": "xla", "devices": -1}, "xla", (0, 1, 2, 3)),
        ({"accelerator": "xla", "devices": 4}, "xla", (0, 1, 2, 3)),
        ({"accelerator": "xla", "devices": 1}, "xla", (0,)),
        ({"accelerator": "xla", "devices": [2]}, "xla", (2,)),
        ({"accelerator": "xla", "strategy": "single_xla"}, "single_xla", (0,)),
        ({"accelerator": "xla", "strategy": "single_device"}, "single_xla", (0,)),
        ({"accelerator": "xla", "strategy": "fsdp"}, "xla_fsdp", (0, 1, 2, 3)),
        ({"accelerator": "xla", "strategy": "xla_fsdp:min_size=9"}, "xla_fsdp", (0, 1, 2, 3)),
    ],
)
def test_what_can_be_asked_for(asked: Any, strategy: str, devices: tuple[int, ...]) -> None:
    found = plan(**asked)
    assert found.accelerator.name == "xla"
    assert (found.strategy.name, found.topology.devices) == (strategy, devices)
    assert found.topology.world_size == 1


def test_some_of_the_devices() -> None:
    assert refused(accelerator="xla", devices=2) == (
        "2 of the 4 XLA devices of this host were asked for, and one process drives all of them "
        "or one: leave devices out for all 4, or write devices=1, or one by its index, as "
        "devices=[1]; with PJRT_DEVICE=CPU, CPU_NUM_DEVICES=2 makes as many as you like "
        "(says torchweft-xla 0.1.0)"
    )
    assert "or one by its index, as devices=[3]" in refused(accelerator="xla", devices=[1, 3])


def test_more_devices_than_there_are() -> None:
    assert refused(NotAvailable, accelerator="tpu", devices=8) == (
        "devices=8 was asked for, but accelerator 'xla' has 4 (0, 1, 2, 3) here"
    )
    assert "names device 4" in refused(NotAvailable, accelerator="xla", devices=[4])


def test_a_strategy_that_is_not_xla_s_names_those_that_are() -> None:
    said = refused(accelerator="xla", strategy="ddp")
    assert "does not serve device 'xla', only 'cuda', 'cpu'" in said
    assert said.endswith("what can be used: single_xla, xla, xla_fsdp, xla_replicas")


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_a_precision_that_is_not_served_names_those_that_are(precision: str) -> None:
    said = refused(accelerator="xla", precision=precision)
    assert f"'{precision}'" in said
    assert "does not serve device 'xla'" in said
    assert said.endswith("what can be used: 16-true, 32-true, bf16-mixed, bf16-true")


def test_a_client_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "METAL")
    said = refused(NotAvailable, accelerator="tpu")
    assert "PJRT_DEVICE='METAL' is no client of XLA that this package serves" in said
    assert "set PJRT_DEVICE to TPU or CPU" in said


def test_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean 'min_size'" in refused(
        TorchweftError, accelerator="xla", strategy="xla_fsdp:minsize=1"
    )


MODEL = """
fabric = Fabric(accelerator="xla", strategy="xla")
net = nn.Linear(8, 4)
"""


def test_a_device_that_was_used_before(tmp_path: Path) -> None:
    text = """
import torch_xla
torch.ones(2, device=torch_xla.device())
torch_xla.sync()
"""
    done = script(text + MODEL + "fabric.launch()", tmp_path, devices=4)
    assert fails(done) == (
        "torchweft.errors.Misuse: an XLA device was used before fabric.launch(), and how several "
        "of them are driven has to be settled before the first is; make tensors on fabric.device, "
        "below fabric.launch()"
    )
    # With one there is nothing to settle.
    done = script(text + MODEL + "fabric.launch(); tell(device=str(fabric.device))", tmp_path)
    assert told(done)["device"] == "xla:0"


def test_a_fork_of_a_process_that_used_one(tmp_path: Path) -> None:
    text = """
import torch_xla
torch_xla.device()
fabric = Fabric(accelerator="xla")
tell(hazard=fabric.accelerator.fork_hazard())
"""
    assert told(script(text, tmp_path))["hazard"] == "an XLA device was used before the fork"
    text = 'import torch_xla; tell(hazard=Fabric(accelerator="xla").accelerator.fork_hazard())'
    assert told(script(text, tmp_path))["hazard"] is None


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ("['a', 'b']", "a list of str"),
        ("[{'text': 'a'}, {'text': 'b'}]", "a list of dict"),
        ("object()", "a object"),
    ],
)
def test_a_batch_without_a_tensor_names_collate_fn(batch: str, what: str, tmp_path: Path) -> None:
    text = (
        MODEL
        + f"""
loader = DataLoader(range(8), batch_size=2, collate_fn=lambda rows: {batch})
for batch in fabric.setup_dataloaders(loader): pass
"""
    )
    assert fails(script(text, tmp_path, devices=2)) == (
        "torchweft.errors.InvalidRequest: strategy 'xla' was given a batch without a tensor, "
        f"{what}, which no XLA device can hold; have the DataLoader's collate_fn make tensors of "
        "it, or write setup_dataloaders(loader, move_to_device=False)"
    )
