"""Folders of strategies that split the model: who writes what, resharding, and failures."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from torchweft import Fabric
from torchweft.errors import CheckpointError, RankFailed
from torchweft.testing import run_ranks

#: Divisible by every number of ranks here.
BATCH = 12
STEPS, SAVED_AT = 6, 3


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 66), nn.BatchNorm1d(66), nn.Tanh(), nn.Linear(66, 3))


def train(fabric, save=None, load=None):
    """The mean over ranks of each step's loss."""
    plain = model()
    if load is not None:
        nn.init.zeros_(plain[0].weight)
    # BatchNorm would see other batches in other worlds.
    plain[1].eval()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2 if load is None else 1.0)
    wrapped, optimizer = fabric.setup(plain, optimizer)
    first = 0
    state = {"model": wrapped, "optimizer": optimizer}
    if load is not None:
        first = fabric.load(load, state)["step"]
    each = BATCH // fabric.world_size
    losses = []
    for step in range(first, STEPS):
        data = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))
        mine = data[fabric.global_rank * each :][:each]
        loss = wrapped(mine).pow(2).mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach()).item())
        if save is not None and step + 1 == SAVED_AT:
            fabric.save(save, {**state, "step": SAVED_AT})
    return losses


def saved_by(folder, n, strategy):
    path = folder / f"{strategy.partition(':')[0]}-{n}"
    return path, run_ranks(n, train, path, strategy=strategy)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    kinds = [(2, "fsdp:policy=Linear"), (4, "fsdp:replicate=2"), (2, "ddp"), (1, "single_device")]
    return {kind: saved_by(folder, *kind) for kind in kinds}


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ((2, "fsdp:policy=Linear"), (1, "fsdp")),
        ((2, "fsdp:policy=Linear"), (4, "fsdp")),
        ((2, "fsdp:policy=Linear"), (4, "fsdp:replicate=2")),
        ((2, "fsdp:policy=Linear"), (2, "ddp")),
        ((2, "fsdp:policy=Linear"), (1, "single_device")),
        ((4, "fsdp:replicate=2"), (2, "fsdp")),
        ((2, "ddp"), (4, "fsdp")),
        ((1, "single_device"), (2, "fsdp")),
    ],
)
def test_training_goes_on_in_any_world(folders, here, there):
    path, uninterrupted = folders[here]
    told = run_ranks(there[0], train, None, path, strategy=there[1])[0]
    assert told == pytest.approx(uninterrupted[SAVED_AT:], rel=1e-5, abs=1e-7)


def stored(folder, part):
    """Bytes of tensors of a part, by file."""
    from torchweft.checkpoint.manifest import Manifest

    sizes = {}
    for name, entry in Manifest.read(str(folder)).entries.items():
        if name.startswith(part):
            for each in entry.parts:
                count = torch.Size(each["shape"]).numel()
                sizes[each["file"]] = sizes.get(each["file"], 0) + 4 * count
    return sizes


@pytest.mark.parametrize(
    ("kind", "writers"),
    [((2, "fsdp:policy=Linear"), 2), ((4, "fsdp:replicate=2"), 4), ((2, "ddp"), 2)],
)
def test_each_rank_writes_its_part_and_what_is_replicated_is_written_once(folders, kind, writers):
    path, _ = folders[kind]
    plain = model()
    names = [f"model.{name}" for name, _ in plain.named_parameters()]
    whole = 4 * sum(p.numel() for p in plain.parameters())
    shares = [stored(path, name) for name in names]
    assert sum(sum(share.values()) for share in shares) == whole
    optimizer = stored(path, "optimizer.")
    assert sum(optimizer.values()) == 2 * whole
    assert len(optimizer) == writers
    # Headers of the files aside, all that is on the disk is that.
    files = {name for name in os.listdir(path) if name.endswith(".distcp")}
    assert files == {f"__{rank}_0.distcp" for rank in range(kind[0])}
    if "fsdp" in kind[1]:
        assert max(optimizer.values()) <= 0.75 * 2 * whole
    # The buffers of several ranks need not go together.
    assert set(stored(path, "model.1.running_")) == {"__0_0.distcp"}


def split_twice(fabric, path):
    """A model on two meshes, one of which is a part of the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plain = model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
    parallelize_module(plain, mesh["tp"], plan)
    fully_shard(plain[0], mesh=mesh["dp"])
    names = {
        type(each).__name__ for p in plain.parameters() for each in getattr(p, "placements", ())
    }
    fabric.save(path, {"model": plain})
    before = [getattr(p, "to_local", lambda p=p: p)().clone() for p in plain.parameters()]
    with torch.no_grad():
        for p in plain.parameters():
            getattr(p, "to_local", lambda p=p: p)().zero_()
    fabric.load(path, {"model": plain})
    after = [getattr(p, "to_local", lambda p=p: p)() for p in plain.parameters()]
    return sorted(names), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_parts_of_parts_on_several_meshes(tmp_path):
    told = run_ranks(4, split_twice, tmp_path / "x", strategy="ddp")
    assert "_StridedShard" in told[0][0]
    assert [same for _, same in told] == [True] * 4
    other = model()
    nn.init.zeros_(other[0].weight)
    Fabric(accelerator="cpu", devices=1).load(tmp_path / "x", {"model": other})
    for name, value in model().state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def loads_whole(fabric, path):
    wrapped = fabric.setup(model())
    rest = fabric.load(path, {"model": wrapped})
    exp_avg = rest["optimizer"]["state"]["0.weight"]["exp_avg"]
    return sorted(rest), tuple(exp_avg.shape), type(exp_avg).__name__


def test_what_is_left_over_is_whole(folders):
    path, _ = folders[(2, "fsdp:policy=Linear")]
    for told in run_ranks(2, loads_whole, path, strategy="fsdp"):
        assert told == (["optimizer", "step"], (66, 8), "Tensor")


def chooses(fabric, path):
    wrapped = fabric.setup(model())
    fabric.save(path, {"model": wrapped}, {"model": lambda name, value: value.shape == (66, 8)})
    # What one rank thinks does not split the others.
    mine = str(3 * fabric.global_rank)
    fabric.save(f"{path}2", {"model": wrapped}, {"model": lambda name, value: name[0] == mine})
    return list(fabric.load(path)["model"]), list(fabric.load(f"{path}2")["model"])


def test_a_filter_sees_shapes_and_is_that_of_rank_0(tmp_path):
    for told in run_ranks(2, chooses, tmp_path / "x", strategy="fsdp"):
        assert told == (["0.weight"], ["0.weight", "0.bias"])


def fails(fabric, path, what):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    wrapped = fabric.setup(model())
    fabric.save(path, {"model": wrapped, "n": 1})
    state = {"model": wrapped, "n": 2}
    if what == "state" and fabric.global_rank == 1:
        state["n"] = _Unsaved()
    elif what == "state":
        state["n"] = nn.Linear(1, 1)
    elif fabric.global_rank == 1:

        def full(*args):
            raise OSError(28, "No space left on device")

        FileSystemWriter.write_data = full
    try:
        fabric.save(path, state)
    except CheckpointError as error:
        fabric.barrier()
        return str(error), fabric.load(path)["n"]


class _Unsaved(nn.Module):
    def state_dict(self, *args, **kwargs):
        raise ValueError("not now")


@pytest.mark.parametrize(
    ("what", "words"),
    [("write", "rank 1: No space left on device"), ("state", "rank 1: ValueError: not now")],
)
def test_every_rank_learns_which_one_failed(tmp_path, what, words):
    told = run_ranks(2, fails, tmp_path / "x", what, strategy="fsdp")
    assert told == [(f"cannot save to '{tmp_path}/x': {words}", 1)] * 2
    assert os.listdir(tmp_path) == ["x"]


def dies(fabric, path, n, moment):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    wrapped = fabric.setup(model())
    write = FileSystemWriter.write_data

    def killed(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    if fabric.global_rank == 1 and moment == "before writing":
        FileSystemWriter.write_data = killed
    elif fabric.global_rank == 1 and moment == "while writing":
        os.fsync = killed
    elif fabric.global_rank == 1 and moment == "behind writing":
        FileSystemWriter.write_data = lambda *args: (write(*args), killed())
    fabric.save(path, {"model": wrapped, "n": n})


@pytest.mark.parametrize("moment", ["before writing", "while writing", "behind writing"])
def test_a_rank_that_is_killed_leaves_the_old_one(tmp_path, moment):
    path = tmp_path / "x"
    run_ranks(2, dies, path, 1, "", strategy="fsdp")
    with pytest.raises(RankFailed, match="rank 1 of 2 failed: killed by signal 9"):
        run_ranks(2, dies, path, 2, moment, strategy="fsdp")
    loaded = Fabric(accelerator="cpu", devices=1).load(path)
    assert loaded["n"] == 1
    assert torch.equal(loaded["model"]["0.weight"], model()[0].weight)
    run_ranks(2, dies, path, 3, "", strategy="fsdp")
    assert os.listdir(tmp_path) == ["x"]
