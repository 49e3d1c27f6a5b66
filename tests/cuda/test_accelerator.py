"""NVIDIA GPUs as an accelerator."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from torchweft import Fabric
from torchweft.api import RankInfo
from torchweft.errors import NotAvailable
from torchweft_cuda.accelerator import CUDA

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU here"
)
needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@needs_none
@pytest.mark.parametrize("name", ["cuda", "gpu"])
def test_asked_for_without_a_gpu(name: str) -> None:
    with pytest.raises(NotAvailable, match=f"accelerator '{name}' cannot be used here") as caught:
        Fabric(accelerator=name, devices=1)
    assert "'cuda' (torchweft-cuda" in str(caught.value)
    assert "no NVIDIA driver answers" in str(caught.value)


@needs_none
def test_bind_says_what_to_compare() -> None:
    with pytest.raises(NotAvailable, match=r"torch\.version\.cuda with the driver"):
        CUDA().bind(RankInfo(), (0,))


@needs_none
def test_no_hazard_where_nothing_was_opened() -> None:
    assert CUDA().fork_hazard() is None


@gpu
@needs_gpu
def test_binds_the_device_of_its_rank() -> None:
    last = torch.cuda.device_count() - 1
    device = CUDA().bind(RankInfo(), (last,))
    assert device == torch.device("cuda", last)
    assert torch.cuda.current_device() == last


@gpu
@needs_gpu
def test_looking_alone_is_a_hazard() -> None:
    """In a fresh process: nothing was asked of CUDA before."""
    code = (
        "from torchweft_cuda.accelerator import CUDA\n"
        "import torch\n"
        "before = CUDA().fork_hazard()\n"
        "torch.cuda.is_available()\n"
        "print(before, '|', CUDA().fork_hazard())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    before, after = ended.stdout.strip().split(" | ")
    assert before == "None"
    assert "CUDA" in after


@gpu
@needs_gpu
def test_memory_and_random_state() -> None:
    accelerator = CUDA()
    device = accelerator.bind(RankInfo(), (0,))
    state = accelerator.rng_state()
    first = torch.rand(4, device=device)
    accelerator.set_rng_state(state)
    assert torch.equal(torch.rand(4, device=device), first)
    held = torch.zeros(1 << 20, device=device)
    assert accelerator.memory()["allocated"] >= held.nbytes
    accelerator.synchronize()
