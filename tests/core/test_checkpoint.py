"""torchweft.checkpoint: saving and loading by every process of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.optim import SGD

from torchweft.api import (
    Alone,
    Collectives,
    Place,
    Precision,
    RankInfo,
    Rendezvous,
    Run,
    RunPlan,
    Strategy,
)
from torchweft.builtin.cpu import CPU
from torchweft.checkpoint import load, load_raw, save
from torchweft.errors import CheckpointError
from torchweft.wrappers import FabricModule, wrap_optimizer


def run_of(rank: RankInfo, collectives: Collectives) -> Run:
    strategy, precision, device = Strategy(), Precision(), torch.device("cpu")
    place = Place(
        plan=cast(RunPlan, None),
        rank=rank,
        rendezvous=Rendezvous(),
        accelerator=CPU(),
        device=device,
        precision=precision,
    )
    strategy.start(place)
    return Run(
        plan=place.plan,
        rank=rank,
        accelerator=place.accelerator,
        device=device,
        strategy=strategy,
        precision=precision,
        collectives=collectives,
    )


@pytest.fixture
def run() -> Run:
    return run_of(RankInfo(), Alone())


def model_and_optimizer(run: Run, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    optimizer = SGD(module.parameters(), lr=0.1 * (1 + seed), momentum=0.9)
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    model = FabricModule(module, module, run.strategy, run.precision, [False])
    return model, wrap_optimizer(optimizer, run.strategy, [module])


def test_what_is_saved_is_loaded(run: Run, tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(run, seed=0)
    path = tmp_path / "new" / "x.ckpt"
    save(run, path, {"model": model, "optimizer": optimizer, "epoch": 3})
    other, its_optimizer = model_and_optimizer(run, seed=1)
    assert load(run, path, {"model": other, "optimizer": its_optimizer}) == {"epoch": 3}
    assert torch.equal(other.weight, model.weight)
    assert its_optimizer.param_groups[0]["lr"] == 0.1
    momentum = its_optimizer.state[other.weight]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state[model.weight]["momentum_buffer"])


def test_without_a_state_everything_is_returned(run: Run, tmp_path: Path) -> None:
    save(run, tmp_path / "x.ckpt", {"model": nn.Linear(1, 1), "epoch": 3})
    assert list(load(run, tmp_path / "x.ckpt")) == ["model", "epoch"]


def test_a_file_of_one_state_fills_one_object(run: Run, tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(run, seed=0)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other, its_optimizer = model_and_optimizer(run, seed=1)
    load_raw(run, tmp_path / "model.pt", other)
    load_raw(run, tmp_path / "optimizer.pt", its_optimizer)
    assert torch.equal(other.weight, model.weight)
    assert its_optimizer.param_groups[0]["lr"] == 0.1
    load_raw(run, tmp_path / "model.pt", nn.Linear(3, 2, bias=False), strict=False)


def test_what_does_not_fit_names_the_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    save(run, path, {"epoch": 3})
    with pytest.raises(CheckpointError) as caught:
        load(run, path, {"model": nn.Linear(1, 1)})
    assert str(caught.value) == (
        f"'{path}': the checkpoint has no 'model'; it holds 'epoch'. Pass strict=False to load "
        "without"
    )
    assert load(run, path, {"model": nn.Linear(1, 1)}, strict=False) == {"epoch": 3}


def test_objects_are_loaded_on_request_alone(run: Run, tmp_path: Path) -> None:
    torch.save({"a": complex, "model": nn.Linear(1, 1)}, tmp_path / "x.ckpt")
    for weights_only in (None, True):
        with pytest.raises(CheckpointError, match="not safe to load"):
            load(run, tmp_path / "x.ckpt", weights_only=weights_only)
    loaded = load(run, tmp_path / "x.ckpt", weights_only=False)
    assert isinstance(loaded["model"], nn.Linear)


RANK = """
import json, os, sys
sys.path.insert(0, sys.argv[3])
import torch, torch.distributed as dist
from pathlib import Path
from torchweft.api import ProcessGroup, RankInfo
from torchweft.checkpoint import load, save
from torchweft.errors import CheckpointError
from test_checkpoint import model_and_optimizer, run_of

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
run = run_of(RankInfo(rank=rank, world_size=2), ProcessGroup(torch.device("cpu")))
model, optimizer = model_and_optimizer(run, seed=0)
result = []
for path in (folder / "store" / "x.ckpt", folder / "x.ckpt"):
    try:
        save(run, path, {"model": model, "optimizer": optimizer, "rank": rank})
        result.append(path.exists())
    except CheckpointError as error:
        result.append(str(error))
other, its_optimizer = model_and_optimizer(run, seed=rank + 1)
state = {"model": other, "optimizer": its_optimizer, "rank": None}
load(run, folder / "x.ckpt", state)
result.append(state["rank"])
result.append(torch.equal(other.weight, model.weight))
print(json.dumps(result), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_every_rank_learns_how_it_ended(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path), here],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = []
        for rank in ranks:
            output, errors = rank.communicate(timeout=100)
            assert rank.returncode == 0, errors
            results.append(json.loads(output))
    finally:
        for rank in ranks:
            rank.kill()
    refused = f"cannot save to '{tmp_path}/store/x.ckpt': '{tmp_path}/store' is not a folder"
    assert results == [[refused, True, 0, True], [f"rank 0: {refused}", True, 0, True]]
