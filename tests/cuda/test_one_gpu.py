"""Two ranks on one GPU over gloo, which NCCL refuses; and the same script on the processor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchweft.testing.commands import clean_environment

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

HOOKS = """
import sys

from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec


@hookimpl
def torchweft_accelerators():
    return [AcceleratorSpec(name="shared", target="train:Shared", device=sys.argv[1])]
"""

SCRIPT = """
import os
import sys

import hooks
import torch
import torch.distributed as dist
from torch import nn

from torchweft import Fabric
from torchweft.specs import load_target

TARGETS = {"cuda": "torchweft_cuda.accelerator:CUDA", "cpu": "torchweft.builtin.cpu:CPU"}


class Shared(load_target(TARGETS[sys.argv[1]], "the test")):
    def bind(self, rank, devices):
        return super().bind(rank, [0])


def train(world, precision):
    fabric = Fabric(
        accelerator="shared",
        devices=world,
        strategy="ddp:process_group_backend=gloo" if world > 1 else "auto",
        precision=precision,
        plugins=[hooks],
    )
    fabric.launch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.05))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x = torch.randn(8, 4, generator=generator)[fabric.global_rank :: world].to(fabric.device)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    mean = fabric.all_reduce(loss.detach()).item()
    if fabric.global_rank == 0:
        backend = dist.get_backend() if dist.is_initialized() else "alone"
        print(f"ended {mean} {fabric.device.type} {backend}")


if __name__ == "__main__":
    train(int(os.environ.get("WORLD_SIZE", "1")), sys.argv[2])
"""


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)
@pytest.mark.parametrize(("precision", "near"), [("32-true", 1e-5), ("bf16-mixed", 0.1)])
def test_two_ranks_end_where_one_does(
    device: str, precision: str, near: float, tmp_path: Path
) -> None:
    (tmp_path / "hooks.py").write_text(HOOKS)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    losses = {}
    for words, backend in (agent, "gloo"), ([], "alone"):
        done = subprocess.run(
            [sys.executable, *words, str(script), device, precision],
            env=clean_environment({"OMP_NUM_THREADS": "1"}),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        *_, loss, kind, found = done.stdout.split()
        assert (kind, found) == (device, backend)
        losses[backend] = float(loss)
    assert losses["gloo"] == pytest.approx(losses["alone"], rel=near)
