"""A process per device. XLA's client for the processor has no replicas: here there is one process.

What is between several is refused here, and runs on TPUs alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.xla.scripts import fails, script, told
from torchweft.errors import RankFailed
from torchweft.testing import StrategyConformance, run_ranks

SCRIPT = """
def train(fabric, steps):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    data = TensorDataset(torch.randn(8 * steps, 4))
    losses = []
    for (x,) in fabric.setup_dataloaders(DataLoader(data, batch_size=8)):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    import os
    return {"losses": torch.stack(losses), "who": (fabric.global_rank, fabric.world_size),
            "device": str(fabric.device), "process": os.getpid()}


def fail(fabric):
    raise ValueError("had enough")


if __name__ == "__main__":
    import os
    fabric = Fabric(accelerator="xla", devices=1, strategy="xla_replicas", launcher="xla_launch")
"""


class TestReplicas(StrategyConformance):
    strategy = "xla_replicas"
    accelerator = "xla"
    devices = (1,)
    tolerance = 1e-4
    timeout = 180.0


def test_torch_xla_launch_makes_the_process(tmp_path: Path) -> None:
    text = (
        SCRIPT
        + """
    found = fabric.launch(train, 20)
    tell(**{**found, "losses": found["losses"].tolist(), "here": os.getpid()})
    tell(again=fabric.launch(train, 3)["who"])
"""
    )
    found = told(script(text, tmp_path))
    assert found["who"] == found["again"] == [0, 1]
    assert found["device"] == "xla:0"
    assert found["process"] != found["here"]
    assert found["losses"][-1] < found["losses"][0] / 2


def test_its_failure_is_told_with_its_cause(tmp_path: Path) -> None:
    said = fails(script(SCRIPT + "    fabric.launch(fail)", tmp_path))
    assert said == (
        "torchweft.errors.RankFailed: a process of 'torch_xla.launch' failed: "
        "ValueError: had enough"
    )


def test_a_function_is_needed_and_no_device_may_be_in_use(tmp_path: Path) -> None:
    assert "fabric.launch(function)" in fails(script(SCRIPT + "    fabric.launch()", tmp_path))
    used = "    import torch_xla; torch_xla.device()\n    fabric.launch(train, 2)"
    assert fails(script(SCRIPT + used, tmp_path)) == (
        "torchweft.errors.Misuse: launcher 'xla_launch' makes fresh processes, and an XLA device "
        "was used before the fork: no other process can have that device; make tensors below "
        "fabric.launch(function)"
    )


def nothing(fabric: object) -> None:
    pass


def test_several_processes_on_the_processor_are_refused() -> None:
    environ = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    asked = {"accelerator": "xla", "strategy": "xla_replicas", "environ": environ}
    with pytest.raises(RankFailed, match="runs in 2 processes, and XLA knows of"):
        run_ranks(2, nothing, **asked)
