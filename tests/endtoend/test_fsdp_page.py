"""``docs/fsdp.md``: every code block, the table of options, and the picture."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from tests.pages import Runner, blocks, environment
from torchweft.testing import run_ranks
from torchweft_cuda.fsdp import FSDPStrategy

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "fsdp.md"


@pytest.mark.timeout(300)
def test_every_code_block_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TORCHWEFT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # What torch warns of would stand in the output; here it is an error.
    runner = Runner(tmp_path, environment(PYTHONWARNINGS="error"))
    loaded = set(sys.modules)
    for block in blocks(PAGE):
        runner.run(block)
    for name in set(sys.modules) - loaded:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_the_table_has_all_options_and_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\S+)` \| \w", PAGE.read_text("utf-8"), re.MULTILINE)
    options = inspect.signature(FSDPStrategy).parameters.values()
    assert rows == [(option.name, repr(option.default)) for option in options]


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https)([^)]+)\)", PAGE.read_text("utf-8")):
        assert (DOCS / target).exists(), target


# -- the picture -----------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two layers whose weights tell where a part of them is from, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            for module in (self.norm, self.up, self.down):
                module.weight.copy_(torch.arange(module.weight.numel()).view_as(module.weight))

    def parallelize(self, mesh):
        return {"up": ColwiseParallel(), "down": RowwiseParallel()}


def parts(fabric):
    """Where a rank is, what it is fed and what it holds."""
    model = fabric.setup(Layers())
    held = {name: getattr(model, name).weight.to_local() for name in ("norm", "up", "down")}
    shard = fabric.strategy.shard
    return fabric.mesh.get_coordinate(), shard.first, {n: t.detach() for n, t in held.items()}


def test_the_picture_shows_what_each_rank_holds() -> None:
    spec = importlib.util.spec_from_file_location("picture", DOCS / "images" / "mesh.py")
    assert spec is not None
    assert spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    told = run_ranks(8, parts, strategy="fsdp:replicate=2,shard=2,tensor=2")
    for rank, replicate, shard, tensor in picture.ranks():
        place, fed, held = told[rank]
        assert tuple(place) == (replicate, shard, tensor)
        assert fed == replicate * picture.SHARD + shard
        for name, mine in held.items():
            whole = getattr(Layers(), name).weight.detach()
            left, top, width, height = (round(8 * x) for x in picture.part(name, shard, tensor))
            expected = whole[top : top + height]
            if whole.dim() == 2:
                expected = expected[:, left : left + width]
            assert torch.equal(mine, expected), (rank, name)
