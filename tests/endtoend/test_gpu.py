"""Every way to start ranks on a GPU, and the watchdog over NCCL."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PYTHON = sys.executable
SEARCHED = [path for path in [os.environ.get("PYTHONPATH")] if path]
RUN = [PYTHON, "-m", "torchweft", "run"]

# NCCL refuses two ranks on one GPU, gloo does not.
SHARED = """
from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec, load_target


class Shared(load_target("torchweft_cuda.accelerator:CUDA", "the test")):
    def bind(self, rank, devices):
        return super().bind(rank, [0])


@hookimpl
def torchweft_accelerators():
    return [AcceleratorSpec(name="shared", target="shared:Shared", device="cuda")]
"""

SCRIPT = """
import os
import sys

import torch
from torch import nn

from torchweft import Fabric

GIVEN = {"devices": int(os.environ["DEVICES"])} if "DEVICES" in os.environ else {}


def train(fabric):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.05))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x = torch.randn(8, 4, generator=generator)[fabric.global_rank :: fabric.world_size]
        x = x.to(fabric.device)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if fabric.global_rank == 0:
        total = sum(p.double().sum().item() for p in model.parameters())
        print(f"{fabric.world_size} {fabric.device.type} {total:.5f}")


if __name__ == "__main__":
    launcher = sys.argv[1] if len(sys.argv) > 1 else "auto"
    several = GIVEN.get("devices") != 1
    fabric = Fabric(
        accelerator="shared",
        strategy="ddp:process_group_backend=gloo" if several else "auto",
        launcher=launcher,
        **GIVEN,
    )
    if launcher in ("spawn", "forkserver"):
        fabric.launch(train)
    else:
        fabric.launch()
        train(fabric)
"""

WAYS = {
    "run": ([*RUN, "--devices", "2"], [], {}),
    "run-fresh": ([*RUN, "--no-preload", "--devices", "2"], [], {}),
    "torchrun": ([PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2"], [], {}),
    "fork": ([PYTHON], [], {"DEVICES": "2"}),
    "spawn": ([PYTHON], ["spawn"], {"DEVICES": "2"}),
    "forkserver": ([PYTHON], ["forkserver"], {"DEVICES": "2"}),
}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "shared.py").write_text(SHARED)
    information = tmp_path / "shared-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: shared\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[torchweft]\nshared = shared\n")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_end_where_one_does(way: str, script: Path, run) -> None:
    before, after, environ = WAYS[way]
    path = {"PYTHONPATH": os.pathsep.join([str(script.parent), *SEARCHED])}
    alone = run(PYTHON, script, environ={"DEVICES": "1", **path})
    assert alone.status == 0, alone.err
    done = run(*before, script, *after, environ={**environ, **path})
    assert done.status == 0, done.err
    assert "torchweft" not in done.err
    one, two = alone.out.split(), done.out.split()
    assert (one[:2], two[:2]) == (["1", "cuda"], ["2", "cuda"])
    assert float(two[2]) == pytest.approx(float(one[2]), abs=1e-3)


@pytest.mark.parametrize("fresh", [[], ["--no-preload"]], ids=["preloaded", "fresh"])
def test_a_rank_that_fails_is_told_once(fresh: list[str], script: Path, run) -> None:
    text = script.read_text().replace(
        "    for _ in", "    1 / (1 - fabric.global_rank)\n    for _ in"
    )
    script.write_text(text)
    environ = {"PYTHONPATH": os.pathsep.join([str(script.parent), *SEARCHED])}
    done = run(*RUN, *fresh, "--devices", "2", script, environ=environ)
    assert done.status == 1
    assert done.err.count("ZeroDivisionError") == 2  # the first line, and the traceback's last
    assert "rank 1" in done.err.splitlines()[0]


def test_the_watchdog_knows_operations_of_nccl(script: Path, tmp_path: Path, run) -> None:
    script.write_text(
        "import time\n"
        "import torch\n"
        "import torch.distributed as dist\n"
        "from torchweft import Fabric\n"
        "fabric = Fabric(accelerator='shared', strategy='ddp:process_group_backend=gloo')\n"
        "fabric.launch()\n"
        # Each a group of its own, since NCCL refuses two of one GPU in one.
        "group = [dist.new_group([rank], backend='nccl') for rank in (0, 1)][fabric.global_rank]\n"
        "dist.all_reduce(torch.ones(3, device=fabric.device), group=group)\n"
        "torch.cuda.synchronize()\n"
        "torch.cuda._sleep(10**11 * fabric.global_rank)\n"  # cycles of the GPU
        "dist.all_reduce(torch.ones(5, device=fabric.device), group=group)\n"
        "torch.cuda.synchronize()\n"
        "time.sleep(600)\n"
    )
    logs = tmp_path / "logs"
    environ = {"PYTHONPATH": os.pathsep.join([str(script.parent), *SEARCHED])}
    flags = ["--timeout", "4", "--log-dir", logs]
    done = run(*RUN, "--devices", "2", *flags, script, environ=environ)
    assert done.status == 1
    told = done.err.splitlines()[0]
    assert (
        "rank 1 of 2 failed: CollectiveTimeout: all_reduce of 5 Float, operation 2 in the group of "
        "rank 1, took longer than 4 s (--timeout): rank 1 came to it; every rank's stacks"
    ) in told
    assert 'train.py", line 12' in (logs / "stacks-rank-1.txt").read_text()
