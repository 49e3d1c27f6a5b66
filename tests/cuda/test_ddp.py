"""DistributedDataParallel as a strategy."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchweft import Fabric
from torchweft.errors import IncompatiblePlan, UnknownOption
from torchweft_cuda.ddp import DDPStrategy

DEFAULTS_OF_OUR_OWN = {"gradient_as_bucket_view": True}


def test_every_keyword_of_torch_is_taken() -> None:
    theirs = inspect.signature(DistributedDataParallel).parameters
    ours = inspect.signature(DDPStrategy).parameters
    assert set(theirs) - {"module"} <= set(ours)
    differing = {
        name: ours[name].default
        for name in theirs
        if name != "module" and ours[name].default != theirs[name].default
    }
    assert differing == DEFAULTS_OF_OUR_OWN
    for name in DEFAULTS_OF_OUR_OWN:
        assert f"{name}:" in (DDPStrategy.__doc__ or "")


def test_three_spellings_of_one_request() -> None:
    ways = [
        {"strategy": "ddp:find_unused_parameters=true"},
        {"strategy": "ddp_find_unused_parameters_true"},
        {"strategy": DDPStrategy(find_unused_parameters=True)},
    ]
    fabrics = [Fabric(accelerator="cpu", devices=2, **way) for way in ways]
    assert {fabric.plan.strategy.name for fabric in fabrics} == {"ddp"}
    keywords = [fabric.strategy._keywords for fabric in fabrics]
    assert keywords[0] == keywords[1] == keywords[2]
    assert keywords[0]["find_unused_parameters"] is True


def test_several_options_in_a_string() -> None:
    fabric = Fabric(
        accelerator="cpu", devices=2, strategy="ddp:static_graph=true,bucket_cap_mb=0.5"
    )
    assert fabric.strategy._keywords["static_graph"] is True
    assert fabric.strategy._keywords["bucket_cap_mb"] == 0.5


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UnknownOption, match="did you mean 'find_unused_parameters'"):
        Fabric(accelerator="cpu", devices=2, strategy="ddp:find_unused_parameter=true")


def test_a_keyword_that_this_torch_lacks(monkeypatch) -> None:
    signature = inspect.signature(DistributedDataParallel)
    kept = [p for name, p in signature.parameters.items() if name != "static_graph"]
    real = inspect.signature

    def without(callable_, **kwargs):
        if callable_ is DistributedDataParallel:
            return signature.replace(parameters=kept)
        return real(callable_, **kwargs)

    monkeypatch.setattr(inspect, "signature", without)
    with pytest.raises(IncompatiblePlan, match="static_graph") as caught:
        DDPStrategy(static_graph=True)
    assert f"torch {torch.__version__}" in str(caught.value)
    DDPStrategy()  # what nobody asked for is not missed


@pytest.mark.parametrize("preset", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_presets_are_launchers(preset: str) -> None:
    plan = Fabric(accelerator="cpu", devices=2, strategy=preset).plan
    assert plan.strategy.name == "ddp"
    assert plan.launcher.name == ("spawn" if preset == "ddp_spawn" else "fork")


def test_a_preset_against_another_launcher() -> None:
    with pytest.raises(IncompatiblePlan) as caught:
        Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn", launcher="fork")
    assert "'spawn'" in str(caught.value)
    assert "'fork'" in str(caught.value)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 1)
        self.unused = nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.sum()
        return self.used(x)


def in_two_ranks(fabric: Fabric) -> dict:
    """Everything that is checked with two real processes, in one launch."""
    said: dict = {}
    rank = fabric.global_rank
    torch.manual_seed(rank)  # different on purpose: rank 0's parameters are everybody's
    model = fabric.setup(Branches())
    said["wrapped"] = type(model.prepared).__name__
    weights = fabric.all_gather(model.used.weight.detach())
    said["same start"] = bool(torch.equal(weights[0], weights[1]))
    # Twice, since DDP complains at the second forward about parameters that got no gradient.
    for _ in range(2):
        fabric.backward(model(torch.full((2, 3), float(rank + 1))).sum())
    # Two passes, each the mean of 2 * 1 and 2 * 2.
    said["mean gradient"] = model.used.weight.grad.flatten().tolist()
    model.zero_grad()
    with fabric.no_backward_sync(model):
        fabric.backward(model(torch.full((1, 3), float(rank + 1))).sum())
    said["local gradient"] = model.used.weight.grad.flatten().tolist()
    fabric.backward(model(torch.full((1, 3), float(rank + 1))).sum())
    said["accumulated"] = model.used.weight.grad.flatten().tolist()
    said["names"] = sorted(model.state_dict())
    frozen = nn.Linear(2, 2).requires_grad_(False)
    said["frozen"] = type(fabric.setup(frozen).prepared).__name__
    said["replicas"] = fabric.num_replicas
    return said


@pytest.mark.parametrize("launcher", ["fork", "spawn"])
def test_two_ranks(launcher: str) -> None:
    strategy = "ddp_find_unused_parameters_true"
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, launcher=launcher)
    said = fabric.launch(in_two_ranks)
    assert said == {
        "wrapped": "DistributedDataParallel",
        "same start": True,
        "mean gradient": [6.0] * 3,
        "local gradient": [1.0] * 3,
        "accumulated": [3.0] * 3,
        "names": ["seen", "unused.bias", "unused.weight", "used.bias", "used.weight"],
        "frozen": "Linear",
        "replicas": 2,
    }


def test_one_rank_needs_no_launch() -> None:
    """A group of one process, in an interpreter of its own, which it leaves at its end."""
    import subprocess
    import sys

    code = (
        "import torch\n"
        "from torchweft import Fabric\n"
        "fabric = Fabric(accelerator='cpu', devices=1, strategy='ddp')\n"
        "model = fabric.setup(torch.nn.Linear(2, 2))\n"
        "fabric.backward(model(torch.ones(1, 2)).sum())\n"
        "print(type(model.prepared).__name__, fabric.world_size)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=100
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "DistributedDataParallel 1\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU here")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_nccl_with_one_rank(precision: str) -> None:
    import subprocess
    import sys

    code = (
        "import torch\n"
        "from torchweft import Fabric\n"
        f"fabric = Fabric(accelerator='cuda', devices=1, strategy='ddp', precision={precision!r})\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Linear(8, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.05)\n"
        "model, optimizer = fabric.setup(model, optimizer)\n"
        "x = torch.randn(64, 8, device=fabric.device)\n"
        "y = x.sum(1, keepdim=True)\n"
        "losses = []\n"
        "for _ in range(50):\n"
        "    optimizer.zero_grad()\n"
        "    loss = torch.nn.functional.mse_loss(model(x), y)\n"
        "    fabric.backward(loss)\n"
        "    optimizer.step()\n"
        "    losses.append(loss.item())\n"
        "assert torch.distributed.get_backend() == 'nccl'\n"
        "assert losses[-1] < losses[0] / 10, losses\n"
        "print(fabric.all_reduce(2.0, reduce_op='sum').item())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=110
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "2.0\n"
