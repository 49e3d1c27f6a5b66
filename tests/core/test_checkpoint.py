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
from torchweft.errors import CheckpointError, InvalidRequest
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


def test_what_the_users_code_raises_is_told_and_is_the_cause(run: Run, tmp_path: Path) -> None:
    def keep(name: str, value: Any) -> bool:
        raise KeyError(name)

    for name in ("x.ckpt", "x"):
        with pytest.raises(CheckpointError) as caught:
            save(run, tmp_path / name, {"model": nn.Linear(1, 1)}, {"model": keep})
        assert str(caught.value) == f"cannot save to '{tmp_path}/{name}': KeyError: 'weight'"
        assert isinstance(caught.value.__cause__, KeyError)
        with pytest.raises(InvalidRequest, match=r"^filter has the key 'modle', which"):
            save(run, tmp_path / name, {"model": 1}, {"modle": keep})


# -- what stays in the file ----------------------------------------------------------------------


def mapped_file(tensor: torch.Tensor) -> str:
    """The file that a tensor's memory is mapped to, if any."""
    address = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        range_, *_, file = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in range_.split("-"))
        if start <= address < end:
            return file if file.startswith("/") else ""
    return ""


class Averages:
    def __init__(self) -> None:
        self.held: Any = None

    def state_dict(self) -> Any:
        return {"held": torch.ones(5000), "same": self.held}

    def load_state_dict(self, state: Any) -> None:
        self.held = state["held"]


def saved_to(run: Run, path: Path) -> dict[str, Any]:
    model, optimizer = model_and_optimizer(run, seed=0)
    state = {"model": model, "optimizer": optimizer, "plain": {"ema": torch.ones(5000)}}
    save(run, path, {**state, "averages": Averages(), "rest": [torch.arange(5000), 3]})
    return state


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are Linux's to tell")
def test_what_is_not_asked_for_is_not_read_into_memory(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    saved_to(run, path)
    model, optimizer = model_and_optimizer(run, seed=1)
    averages = Averages()
    state = {"model": model, "optimizer": optimizer, "averages": averages, "plain": None}
    left = load(run, path, state)
    assert list(left) == ["rest"]
    assert mapped_file(left["rest"][0]) == str(path)
    # What the run goes on with is its own.
    held = [*model.parameters(), *(each["momentum_buffer"] for each in optimizer.state.values())]
    assert [mapped_file(each) for each in held] == [""] * 4
    assert mapped_file(averages.held) == mapped_file(state["plain"]["ema"]) == ""
    # Without a state all of it is asked for.
    assert mapped_file(load(run, path)["rest"][0]) == ""
    # So it is with objects that were not set up.
    save(run, path, {"optimizer": optimizer.optimizer, "model": model.module})
    load(run, path, {"optimizer": optimizer.optimizer, "model": model.module})
    held = [*model.parameters(), *(each["momentum_buffer"] for each in optimizer.state.values())]
    assert [mapped_file(each) for each in held] == [""] * 4


def test_what_is_left_over_outlives_its_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    state = saved_to(run, path)
    left = load(run, path, {"model": state["model"]})
    save(run, path, {"rest": [torch.zeros(5000), 4]})
    path.unlink()
    assert torch.equal(left["rest"][0], torch.arange(5000))
    left["rest"][0][7] = 1  # and may be changed


def test_a_file_of_an_older_torch_is_read_whole(run: Run, tmp_path: Path) -> None:
    content = {"model": nn.Linear(3, 2).state_dict(), "rest": torch.ones(3)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    model = nn.Linear(3, 2)
    assert torch.equal(load(run, tmp_path / "x.pt", {"model": model})["rest"], torch.ones(3))
    assert torch.equal(model.weight, content["model"]["weight"])


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
# Now and then torch aborts where its threads are torn down.
os._exit(0)
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
            results.append(json.loads(output.splitlines()[-1]))  # gloo may say something before
    finally:
        for rank in ranks:
            rank.kill()
    refused = (
        f"cannot save to '{tmp_path}/store/x.ckpt': rank 0: '{tmp_path}/store' is not a folder"
    )
    assert results == [[refused, True, 0, True]] * 2
