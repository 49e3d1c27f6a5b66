"""Communication between processes: alone, and between two real ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchweft.api import Alone
from torchweft.errors import InvalidRequest

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
]


# -- alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["mean", "sum", "min", "max", "product"])
def test_dtypes_of_a_reduction(dtype: torch.dtype, op: str) -> None:
    given = torch.tensor([1, 0]).to(dtype)
    reduced = Alone().all_reduce(given, op)
    expected = dtype
    if op == "mean" and not dtype.is_floating_point:
        expected = torch.float32
    if op == "sum" and dtype == torch.bool:
        expected = torch.int64
    assert reduced.dtype == expected
    assert reduced.tolist() == [1, 0]
    assert reduced is not given


def test_a_gathered_tensor_has_one_part() -> None:
    given = torch.ones(2, 3, requires_grad=True)
    assert Alone().all_gather(given).shape == (1, 2, 3)
    assert not Alone().all_gather(given).requires_grad
    assert Alone().all_gather(given, sync_grads=True).requires_grad


def test_there_is_nobody_else() -> None:
    value = object()
    assert Alone().broadcast(value) is value
    Alone().barrier()
    for src in (1, -1):
        with pytest.raises(InvalidRequest, match="the ranks of this run are 0 to 0"):
            Alone().broadcast(value, src=src)
    with pytest.raises(InvalidRequest, match="reduce_op='avg' is not known"):
        Alone().all_reduce(torch.ones(1), "avg")


# -- two processes -------------------------------------------------------------------------------

SCRIPT = '''
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from torchweft import Fabric
from torchweft.errors import InvalidRequest, Misuse

Pair = namedtuple("Pair", "first second")


def broadcasting(fabric):
    rank = fabric.global_rank
    everything = {
        "any": [1, "text", None, {2, 3}],
        "deep": (torch.arange(3), Pair(torch.ones(1), np.float64(2.5))),
    }
    got = fabric.broadcast(everything if rank == 0 else None)
    assert got["any"] == everything["any"]
    assert torch.equal(got["deep"][0], torch.arange(3)) and got["deep"][1].second == 2.5
    assert fabric.broadcast("mine" if rank == 1 else "yours", src=1) == "mine"
    assert fabric.broadcast({"own": fabric.local_rank}, src=1) == {"own": 1}
    for dtype in (torch.bool, torch.int16, torch.uint16, torch.bfloat16, torch.float64,
                  torch.complex64, torch.float8_e4m3fn):
        sent = torch.tensor([1.0, 0.0]).to(dtype)
        got = fabric.broadcast(sent if rank == 0 else torch.zeros(7))
        assert got.dtype == dtype and got.shape == (2,), got
        assert got.to(torch.complex64).real.tolist() == [1, 0]
    scalar = torch.tensor(3.0) if rank == 0 else "not a tensor"
    assert fabric.broadcast(scalar).item() == 3.0
    assert fabric.broadcast(torch.empty(0, 3) if rank == 0 else 0).shape == (0, 3)
    columns = torch.arange(6.0).reshape(2, 3).t()
    assert torch.equal(fabric.broadcast(columns if rank == 0 else None), columns)
    turned = torch.tensor([1 + 2j]).conj()
    assert fabric.broadcast(turned if rank == 0 else None).tolist() == [1 - 2j]
    weight = torch.nn.Parameter(torch.full((2,), float(rank)))
    got = fabric.broadcast(weight)
    assert got.tolist() == [0, 0] and got.requires_grad == (rank == 0)
    sparse = torch.eye(2).to_sparse()
    assert torch.equal(fabric.broadcast(sparse if rank == 0 else None).to_dense(), torch.eye(2))
    try:
        fabric.broadcast(1, src=2)
        raise AssertionError("src=2")
    except InvalidRequest as error:
        assert str(error) == "broadcast from src=2, but the ranks of this run are 0 to 1"


def gathering(fabric):
    rank = fabric.global_rank
    got = fabric.all_gather(
        {
            "loss": torch.tensor(float(rank)),
            "more": [torch.full((2, 3), rank), (rank, rank + 0.5)],
            "array": np.array([rank]),
            "pair": Pair(bool(rank), torch.tensor([rank], dtype=torch.int16)),
        }
    )
    assert got["loss"].tolist() == [0.0, 1.0]
    assert got["more"][0].shape == (2, 2, 3) and got["more"][0].dtype == torch.int64
    assert got["more"][1][0].tolist() == [0, 1] and got["more"][1][1].tolist() == [0.5, 1.5]
    assert got["array"].tolist() == [[0], [1]]
    assert got["pair"].first.tolist() == [False, True] and got["pair"].first.dtype == torch.bool
    assert got["pair"].second.tolist() == [[0], [1]]
    assert fabric.all_gather(torch.empty(0, 2)).shape == (2, 0, 2)
    columns = torch.arange(6.0).reshape(2, 3).t() + rank
    assert torch.equal(fabric.all_gather(columns)[1], torch.arange(6.0).reshape(2, 3).t() + 1)

    given = torch.full((2,), float(rank + 1), requires_grad=True)
    gathered = fabric.all_gather(given, sync_grads=True)
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (gathered * weights * (rank + 1)).sum().backward()
    # Each rank's loss reaches the part, and the gradients of both are summed.
    assert given.grad.tolist() == [[3.0, 6.0], [9.0, 12.0]][rank]


def reducing(fabric):
    rank = fabric.global_rank
    given = torch.tensor([float(rank), 2.0])
    assert fabric.all_reduce(given) is given and given.tolist() == [0.5, 2.0]
    integers = torch.tensor([rank, 3])
    mean = fabric.all_reduce(integers)
    assert mean.dtype == torch.float32 and mean.tolist() == [0.5, 3.0]
    assert integers.tolist() == [rank, 3]
    assert fabric.all_reduce(integers, reduce_op="sum") is integers
    assert integers.tolist() == [1, 6]
    for op, expected in {
        "mean": 1.5, "avg": 1.5, "AVG": 1.5, "sum": 3, "min": 1, "max": 2, "product": 2,
        dist.ReduceOp.SUM: 3, dist.ReduceOp.MAX: 2,
    }.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.uint8):
            got = fabric.all_reduce(torch.tensor([rank + 1]).to(dtype), reduce_op=op)
            assert got.tolist() == [expected], (op, dtype, got)
        assert fabric.all_reduce(rank + 1, reduce_op=op).item() == expected
    flags = torch.tensor([bool(rank), True])
    assert fabric.all_reduce(flags.clone(), reduce_op="max").tolist() == [True, True]
    assert fabric.all_reduce(flags.clone(), reduce_op="product").tolist() == [False, True]
    assert fabric.all_reduce(flags.clone(), reduce_op="sum").tolist() == [1, 2]
    assert fabric.all_reduce(np.array([rank, 1.0]))[0].item() == 0.5
    shared = torch.ones(1)
    assert fabric.all_reduce({"a": shared, "b": [shared]}, reduce_op="sum") == {
        "a": torch.tensor([2.0]), "b": [torch.tensor([2.0])]
    }
    expanded = torch.full((1,), float(rank)).expand(3)
    assert fabric.all_reduce(expanded, reduce_op="sum").tolist() == [1, 1, 1]
    with torch.inference_mode():
        inferred = torch.full((2,), float(rank))
    assert fabric.all_reduce(inferred, reduce_op="sum").tolist() == [1, 1]
    weight = torch.nn.Parameter(torch.full((2,), float(rank)))
    fabric.all_reduce(weight)
    assert weight.tolist() == [0.5, 0.5] and weight.requires_grad
    loss = (weight * 2).sum()
    fabric.all_reduce(loss)
    loss.backward()
    assert weight.grad.tolist() == [2, 2]
    try:
        fabric.all_reduce(1, reduce_op="xor")
        raise AssertionError("xor")
    except InvalidRequest as error:
        assert "reduce_op='xor' is not known" in str(error)


def taking_turns(fabric, folder):
    note = folder + "/turns"
    for local in (False, True):
        with fabric.rank_zero_first(local=local):
            with open(note, "a") as file:
                file.write(str(fabric.global_rank))
        fabric.barrier("written")
    assert Path(note).read_text() == "0101"


def drawing(fabric):
    """Shuffled data follows the seed, the same on both ranks, and the parts are disjoint."""
    orders = []
    for seed in (1, 1, 2):
        fabric.seed_everything(seed)
        loader = fabric.setup_dataloaders(DataLoader(range(32), batch_size=16, shuffle=True))
        (batch,) = loader
        both = fabric.all_gather(batch).flatten().tolist()
        assert sorted(both) == list(range(32))
        orders.append(both)
    assert orders[0] == orders[1] != orders[2]


def work(fabric, folder, drawn):
    assert fabric.world_size == fabric.num_replicas == 2
    assert torch.rand(1).item() == drawn, "the random streams of the process that launched"
    try:
        fabric.launch()
        raise AssertionError("launched twice")
    except Misuse as error:
        assert "already rank" in str(error)
    broadcasting(fabric)
    gathering(fabric)
    reducing(fabric)
    taking_turns(fabric, folder)
    drawing(fabric)
    return {"ranks": fabric.all_gather(fabric.global_rank), "done": True}


if __name__ == "__main__":
    launcher, folder = sys.argv[1:]
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2, launcher=launcher)
    fabric.seed_everything(11)
    state = torch.get_rng_state()
    drawn = torch.rand(1).item()
    torch.set_rng_state(state)
    result = fabric.launch(work, folder, drawn=drawn)
    print(result["ranks"].tolist(), result["done"])
'''


@pytest.mark.parametrize("launcher", ["fork", "spawn"])
def test_between_two_processes(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), launcher, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[0, 1] True\n")
    assert done.stderr == ""


def test_alone_a_reduction_is_a_copy() -> None:
    given: Tensor = torch.ones(2)
    Alone().all_reduce(given).zero_()
    assert given.tolist() == [1, 1]
