"""NVIDIA GPUs: refused where there is none, and used where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torchweft import Fabric
from torchweft.api import RankInfo
from torchweft.errors import NotAvailable
from torchweft_cuda.accelerator import CUDA

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- without a GPU -------------------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "gpu"])
def test_asked_for_without_a_gpu_it_is_an_error_that_says_why(name: str) -> None:
    with pytest.raises(NotAvailable, match=r"'cuda' .*accelerator='cpu'"):
        Fabric(accelerator=name)


@without_gpu
def test_auto_passes_it_over_and_says_why() -> None:
    plan = Fabric().plan
    assert plan.accelerator.name == "cpu"
    rejected = {r.name: r for d in plan.decisions for r in d.rejected}
    assert "driver" in rejected["cuda"].reason or "CUDA" in rejected["cuda"].reason


@without_gpu
def test_a_process_without_a_gpu_cannot_be_bound() -> None:
    with pytest.raises(NotAvailable, match=r"cannot use a GPU in this process; compare"):
        CUDA().bind(RankInfo(), (0,))


@without_gpu
def test_without_a_device_a_fork_is_safe() -> None:
    assert CUDA().fork_hazard() is None


def test_an_open_device_file_is_a_hazard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even asking whether there is a GPU opens one, without torch calling that initialised."""
    reader = os.readlink

    def readlink(path: Path) -> str:
        target = reader(path)
        return "/dev/nvidiactl" if target == str(tmp_path / "device") else target

    (tmp_path / "device").touch()
    monkeypatch.setattr("torchweft_cuda.accelerator.os.readlink", readlink)
    with open(tmp_path / "device"):
        assert CUDA().fork_hazard() == (
            "CUDA holds /dev/nvidiactl open, which a forked process cannot use"
        )


def test_making_one_touches_no_device() -> None:
    assert run(
        "import torch; from torchweft_cuda.accelerator import CUDA\n"
        "CUDA(); print(torch.cuda.is_initialized())"
    ) == ("False\n")


# -- with a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
class TestOneGPU:
    def test_a_step(self) -> None:
        fabric = Fabric(accelerator="gpu", devices=1)
        assert fabric.plan.accelerator.name == "cuda"
        net = nn.Linear(2, 2)
        model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters()))
        assert fabric.device == torch.device("cuda", 0)
        assert model.weight.device == fabric.device
        assert model.device == fabric.device
        fabric.backward(model(fabric.to_device(torch.ones(1, 2))).sum())
        optimizer.step()
        assert optimizer.state[net.weight]["exp_avg"].device == fabric.device

    def test_it_is_what_auto_takes(self) -> None:
        assert Fabric(devices=1).plan.accelerator.name == "cuda"

    def test_state_from_the_host_follows_the_model(self) -> None:
        net = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        fabric = Fabric(accelerator="cuda", devices=1)
        model, wrapped = fabric.setup(net, optimizer)
        assert optimizer.state[net.weight]["exp_avg"].device == fabric.device
        wrapped.zero_grad()
        fabric.backward(model(fabric.to_device(torch.ones(1, 2))).sum())
        wrapped.step()

    @pytest.mark.parametrize(
        ("precision", "dtype"),
        [
            ("bf16-mixed", torch.float32),
            ("bf16-true", torch.float32),
            ("64-true", torch.float64),
        ],
    )
    def test_precisions(self, precision: str, dtype: torch.dtype) -> None:
        fabric = Fabric(accelerator="cuda", devices=1, precision=precision)
        net = nn.Linear(2, 2)
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        before = model.weight.detach().clone()
        output = model(fabric.to_device(torch.ones(1, 2)))
        assert output.dtype == dtype
        fabric.backward(output.sum())
        optimizer.step()
        assert not torch.equal(model.weight, before)

    def test_modules_are_made_on_the_device(self) -> None:
        fabric = Fabric(accelerator="cuda", devices=1, precision="bf16-true")
        with fabric.init_module():
            net = nn.Linear(2, 2)
        assert (net.weight.device, net.weight.dtype) == (fabric.device, torch.bfloat16)

    def test_memory_and_random_streams(self) -> None:
        fabric = Fabric(accelerator="cuda", devices=1)
        before = fabric.accelerator.memory() if fabric.device else {}
        kept = torch.empty(1 << 20, device=fabric.device)
        after = fabric.accelerator.memory()
        assert set(after) == {"allocated", "reserved", "max_allocated"}
        assert after["allocated"] - before["allocated"] == kept.nbytes
        state = fabric.accelerator.rng_state()
        drawn = torch.rand(3, device=fabric.device)
        fabric.accelerator.set_rng_state(state)
        assert torch.equal(torch.rand(3, device=fabric.device), drawn)
        fabric.accelerator.synchronize()

    def test_what_was_made_on_the_device_is_saved_and_loaded(self, tmp_path: Path) -> None:
        fabric = Fabric(accelerator="cuda", devices=1)
        model = fabric.setup(nn.Linear(2, 2))
        fabric.save(tmp_path / "x.ckpt", {"model": model})
        content = torch.load(tmp_path / "x.ckpt", weights_only=True)
        assert content["model"]["weight"].device.type == "cpu"
        expected = model.weight.detach().clone()
        nn.init.zeros_(model.weight)
        fabric.load(tmp_path / "x.ckpt", {"model": model})
        assert torch.equal(model.weight, expected)
        assert model.weight.device == fabric.device

    def test_deciding_leaves_a_fork_safe_and_asking_torch_does_not(self) -> None:
        assert (
            run(
                "import torch\n"
                "from torchweft import Fabric\n"
                "fabric = Fabric(accelerator='cuda', devices=1)\n"
                "print(fabric.accelerator.fork_hazard())\n"
                "torch.cuda.is_available()\n"
                "print('open' in fabric.accelerator.fork_hazard())\n"
                "torch.zeros(1, device='cuda')\n"
                "print(fabric.accelerator.fork_hazard())\n"
            )
            == "None\nTrue\nCUDA was initialised before the fork\n"
        )

    def test_more_devices_than_there_are_is_an_error(self) -> None:
        with pytest.raises(NotAvailable, match=rf"has {torch.cuda.device_count()} \("):
            Fabric(accelerator="cuda", devices=torch.cuda.device_count() + 1)
