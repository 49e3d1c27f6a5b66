"""Strategy ``fsdp``: models that are made without memory and filled part by part."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from torchweft.errors import RankFailed
from torchweft.testing import run_ranks
from torchweft_cuda.fsdp import FSDPStrategy


class Block(nn.Module):
    """Two layers, initialised a second time by the model that holds them."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """As language models are made: one rule for all layers, tied ends, a mask, a statistic."""

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, width, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("mask", torch.tril(torch.ones(width, width)), persistent=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, x):
        return self.last(self.norm(self.blocks(self.first(x) @ self.mask)))


def divide(model, mesh):
    """Both ends by rows, which are one parameter, and the layers of blocks in between."""
    ends = ColwiseParallel(output_layouts=Replicate())
    return {
        "first": ends,
        "last": ends,
        "blocks.*.up": ColwiseParallel(),
        "blocks.*.down": RowwiseParallel(),
    }


def whole(model):
    """Every parameter and buffer, gathered."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    gathered = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in named}
    return {name: tensor.detach().clone() for name, tensor in gathered.items()}


def made(fabric, seed, deferred):
    torch.manual_seed(seed + fabric.global_rank)
    with fabric.init_module() if deferred else nullcontext():
        plain = Model()
    on_meta = all(tensor.device.type == "meta" for tensor in plain.parameters())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    model, optimizer = fabric.setup(plain, optimizer)
    before = whole(model)
    fabric.backward(model(torch.ones(4, 8)).square().sum())
    optimizer.step()
    drawn = torch.rand(1)
    tied = model.first.weight is model.last.weight
    return {"meta": on_meta, "before": before, "after": whole(model), "next": drawn, "tied": tied}


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp",
        "fsdp:policy=Block",
        "fsdp_cpu_offload",
        FSDPStrategy(tensor=2, policy="Block", parallelize=divide),
    ],
    ids=["whole", "by parts", "on the host", "divided"],
)
def test_a_model_made_without_memory_is_the_one_that_would_have_been_made(strategy):
    deferred = run_ranks(2, made, 3, True, strategy=strategy)
    at_once = run_ranks(2, made, 3, False, strategy=strategy)
    torch.manual_seed(3)
    plain = whole(Model())
    for mine, right in zip(deferred, at_once, strict=True):
        assert (mine["meta"], right["meta"]) == (True, False)
        assert mine["tied"]
        torch.testing.assert_close(mine["before"], plain, rtol=0, atol=0)
        torch.testing.assert_close(mine["after"], right["after"])
        assert mine["next"] == right["next"]


def resident(name):
    """Bytes, of a line of the kernel's account of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024


def peak_of_building(fabric, width, depth):
    def build(width, depth):
        with fabric.init_module():
            model = nn.Sequential(*(Block(width) for _ in range(depth)))
            model.apply(Model._initialise)
        return fabric.setup(model)

    build(4, 2)  # so that nothing is imported in between
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    model = build(width, depth)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    block = sum(p.numel() * p.element_size() for p in model[0].parameters())
    return {"peak": resident("VmHWM") - before, "whole": size, "block": block}


def tell_peaks():
    """Of four ranks, as JSON lines."""
    arguments = (peak_of_building, 1024, 16)
    for told in run_ranks(4, *arguments, strategy="fsdp:policy=Block"):
        print(json.dumps(told))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's to tell")
def test_no_process_holds_more_than_its_share_and_a_block(fresh_interpreter):
    # Read when a process starts: what was freed is given back at once, and memory is what is held.
    environ = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    code = "from tests.cuda.test_fsdp_init import tell_peaks; tell_peaks()"
    done = fresh_interpreter(code, environ=environ, cwd=Path(__file__).parents[2])
    assert done.status == 0, done.err
    # gloo of some versions says something too.
    ranks = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    assert len(ranks) == 4
    for rank in ranks:
        assert rank["whole"] > 128 << 20
        assert rank["peak"] < rank["whole"] / 4 + rank["block"], rank


def with_reset_parameters(fabric):
    torch.manual_seed(0)
    with torch.device("meta"):
        plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return whole(fabric.setup(plain))


def test_a_model_of_the_meta_device_is_filled_by_its_own_methods():
    torch.manual_seed(0)
    plain = whole(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    for mine in run_ranks(2, with_reset_parameters, strategy="fsdp"):
        torch.testing.assert_close(mine, plain, rtol=0, atol=0)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))


def cannot_be_filled(fabric):
    with torch.device("meta"):
        plain = nn.Sequential(nn.Linear(3, 3), Scale())
    fabric.setup(plain)


@pytest.mark.parametrize("strategy", ["fsdp", "single_device"])
def test_a_module_that_cannot_be_filled_is_named(strategy):
    with pytest.raises(RankFailed) as failed:
        run_ranks(1, cannot_be_filled, strategy=strategy)
    assert (
        "1 (Scale) was made on the meta device and cannot be filled: it has no reset_parameters() "
        "to fill 'factor'; build the model under fabric.init_module(), or give the class that "
        "method"
    ) in str(failed.value)


def empty(fabric, path):
    torch.manual_seed(0)
    source = fabric.setup(nn.Linear(4, 4))
    fabric.save(path, {"model": source})
    with fabric.init_module(empty_init=True):
        plain = nn.Linear(4, 4)
    state = torch.random.get_rng_state()
    model = fabric.setup(plain)
    nothing_drawn = torch.equal(state, torch.random.get_rng_state())
    fabric.load(path, {"model": model})
    return nothing_drawn, whole(model)["weight"]


def test_an_empty_model_is_filled_by_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    right = nn.Linear(4, 4).weight.detach()
    for nothing_drawn, weight in run_ranks(2, empty, tmp_path / "x.ckpt", strategy="fsdp"):
        assert nothing_drawn
        assert torch.equal(weight, right)


def makes_a_tensor(fabric):
    with fabric.init_tensor():
        return torch.ones(2)


def test_tensors_are_made_on_the_device():
    (made,) = run_ranks(1, makes_a_tensor, strategy="fsdp")
    assert made.tolist() == [1.0, 1.0]
