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


# -- ranks that do not give the same -------------------------------------------------------------

FORMS = pytest.mark.parametrize("name", ["x.ckpt", "x"])


def told(function, *args):
    """What an error says, as every rank is still there to say."""
    try:
        function(*args)
    except CheckpointError as error:
        return str(error)


class Meter:
    def state_dict(self):
        return {"total": torch.ones(2)}


def gives_more(fabric, path):
    plain = model()
    wrapped, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters()))
    state = {"model": wrapped, "both": {"n": fabric.global_rank}, "optimizer": optimizer}
    if fabric.is_global_zero:
        state = {"history": [1, 2], "meter": Meter(), "ema": nn.Linear(1, 1), **state}
    else:
        state = {**dict(reversed(state.items())), "own": Meter()}
    fabric.save(path, state)
    loaded = fabric.load(path)
    return list(loaded), loaded["history"], loaded["both"], list(loaded["ema"])


@FORMS
def test_what_rank_0_alone_has_is_saved(tmp_path, name):
    keys = ["history", "meter", "ema", "model", "both", "optimizer"]
    for found in run_ranks(2, gives_more, tmp_path / name, strategy="fsdp"):
        assert found == (keys, [1, 2], {"n": 0}, ["weight", "bias"])


def gives_others(fabric, path):
    plain = model()
    wrapped, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters()))
    first = fabric.is_global_zero
    cases = [
        {"model": wrapped, **({"optimizer": optimizer} if first else {"n": 3})},
        {"parts": [wrapped], **({} if first else {"shard": {"w": wrapped[0].weight}})},
        {"parts": [wrapped, optimizer] if first else [optimizer, wrapped]},
        {"parts": dict([("m", wrapped), ("o", optimizer)][:: 1 if first else -1])},
    ]
    return [told(fabric.save, path, state) for state in cases], os.path.exists(path)


@FORMS
def test_models_that_not_all_ranks_give_are_named_in_all_of_them(tmp_path, name):
    path = tmp_path / name
    start = f"cannot save to '{path}': "
    end = (
        "; every rank has to give the same models, optimizers and sharded tensors, in the same "
        "order, while of other values rank 0's are written"
    )
    words = [
        "only rank 0 has state['optimizer'], an optimizer",
        "only ranks 1, 2 have state['shard']['w'], a sharded tensor",
        (
            "only rank 0 has state['parts'][0], a model, only rank 0 has state['parts'][1], an "
            "optimizer, only ranks 1, 2 have state['parts'][0], an optimizer, only ranks 1, 2 have "
            "state['parts'][1], a model"
        ),
        "what is in state['parts'] comes in another order in ranks 1, 2",
    ]
    expected = [f"{start}{each}{end}" for each in words]
    assert run_ranks(3, gives_others, path, strategy="fsdp") == [(expected, False)] * 3


def filters(fabric, path, who, keep):
    wrapped = fabric.setup(model())
    mine = {"model": keep} if fabric.global_rank == who else None
    return told(fabric.save, path, {"model": wrapped}, mine) or list(fabric.load(path)["model"])


def last_layer(name, value):
    return name.startswith("3.") and value.dim() > 0


def has_numbers(name, value):
    return bool(value.sum() != 0)


@FORMS
def test_the_filter_that_holds_is_rank_0s_whoever_has_one(tmp_path, name):
    path = tmp_path / name
    kept = run_ranks(2, filters, path, 0, last_layer, strategy="fsdp")
    assert kept == [["3.weight", "3.bias"]] * 2
    kept = run_ranks(2, filters, path, 1, last_layer, strategy="fsdp")
    assert kept == [list(model().state_dict())] * 2


def test_a_filter_of_one_rank_does_not_wait_for_the_others_numbers(tmp_path):
    file = run_ranks(2, filters, tmp_path / "x.ckpt", 0, has_numbers, strategy="fsdp")
    assert "0.weight" in file[0]
    folder = run_ranks(2, filters, tmp_path / "x", 0, has_numbers, strategy="fsdp")
    assert folder[0] == folder[1]
    assert folder[0].startswith(f"cannot save to '{tmp_path}/x': rank 0: ")
    assert "meta tensor" in folder[0]


# -- one rank fails ------------------------------------------------------------------------------


def filter_fails(fabric, path, rank):
    wrapped = fabric.setup(model())
    fabric.save(path, {"model": wrapped, "n": 1})

    def keep(name, value):
        if fabric.global_rank == rank and name == "1.weight":
            raise KeyError(name)
        return True

    words = told(fabric.save, path, {"model": wrapped, "again": wrapped}, {"model": keep})
    return words, fabric.load(path)["n"]


@FORMS
def test_a_filter_that_fails_is_told_to_all(tmp_path, name):
    words = f"cannot save to '{tmp_path}/{name}': rank 0: KeyError: '1.weight'"
    assert run_ranks(2, filter_fails, tmp_path / name, 0, strategy="fsdp") == [(words, 1)] * 2


def cannot_give(fabric, path):
    state = {"model": fabric.setup(model()), "last": _Unsaved() if fabric.global_rank else Meter()}
    return told(fabric.save, path, state)


@FORMS
def test_an_object_without_a_state_is_told_to_all(tmp_path, name):
    words = f"cannot save to '{tmp_path}/{name}': rank 1: ValueError: not now"
    assert run_ranks(2, cannot_give, tmp_path / name, strategy="fsdp") == [words] * 2


def cannot_read(fabric, path, what):
    wrapped = fabric.setup(model())
    fabric.save(path, {"model": wrapped, "n": 1})
    state = {"model": wrapped}
    if fabric.global_rank == 1 and what == "open":
        path = f"{path}2"
    elif fabric.global_rank == 1 and what == "keys":
        state["other"] = 1
    elif fabric.global_rank == 1:
        import torch.distributed.checkpoint.filesystem as filesystem

        def bad(*args):
            raise OSError(5, "Input/output error")

        filesystem.FileSystemReader.read_data = bad
    return told(fabric.load, path, state)


@pytest.mark.parametrize(
    ("name", "what", "words"),
    [
        ("x", "open", "rank 1: there is no checkpoint '{}2'; "),
        ("x.ckpt", "open", "rank 1: there is no checkpoint '{}2'; "),
        ("x", "keys", "rank 1: '{}': the checkpoint has no 'other'; it holds 'model', 'n'"),
        ("x.ckpt", "keys", "rank 1: '{}': the checkpoint has no 'other'; it holds 'model', 'n'"),
        ("x", "tensors", "rank 1: '{0}': cannot restore state['model'] (FabricModule): cannot "),
    ],
)
def test_no_rank_goes_on_with_what_another_could_not_load(tmp_path, name, what, words):
    path = tmp_path / name
    one, other = run_ranks(2, cannot_read, path, what, strategy="fsdp")
    assert one == other
    assert one.startswith(words.format(path))


# -- memory --------------------------------------------------------------------------------------


def counts_whole(fabric, path):
    """The most gathered tensors that this rank had at one time, and how many it gathered."""
    import weakref

    from torch.distributed.tensor import DTensor

    plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    wrapped, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters()))
    fabric.backward(wrapped(torch.ones(2, 8)).sum())
    optimizer.step()
    gather, made, most = DTensor.full_tensor, [], 0

    def counted(self, *args, **kwargs):
        nonlocal most
        gathered = gather(self, *args, **kwargs)
        made.append(weakref.ref(gathered))
        most = max(most, sum(each() is not None for each in made))
        return gathered

    DTensor.full_tensor = counted
    plain_too = {"ema": [p.detach() for p in wrapped.parameters()]}
    fabric.save(path, {"model": wrapped, "optimizer": optimizer, "plain": plain_too})
    return most, len(made)


def test_the_one_file_is_gathered_onto_rank_0_one_tensor_at_a_time(tmp_path):
    first, *others = run_ranks(3, counts_whole, tmp_path / "x.ckpt", strategy="fsdp")
    # Twelve parameters, two tensors of the optimizer for each, and once more.
    assert first[1] == 48
    # One more while the next is made, before its name is given to it.
    assert [(most <= 2, count) for most, count in others] == [(True, 48)] * 2


def loads_model(fabric, path):
    def mapped(tensor):
        address = tensor.untyped_storage().data_ptr()
        with open("/proc/self/maps", encoding="utf-8") as maps:
            for line in maps:
                start, end = (int(number, 16) for number in line.split()[0].split("-"))
                if start <= address < end:
                    return line.rstrip().endswith(".ckpt")
        return False

    plain = model()
    wrapped, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters()))
    state = {"model": wrapped, "optimizer": optimizer}
    fabric.backward(wrapped(torch.ones(4, 8)).sum())
    optimizer.step()
    fabric.save(path, state)
    left = fabric.load(path, {"model": wrapped})["optimizer"]["state"]["0.weight"]
    fabric.load(path, state)
    held = [*wrapped.parameters(), *wrapped.buffers()]
    held += [tensor for each in optimizer.state.values() for tensor in each.values()]
    own = [getattr(tensor, "to_local", lambda t=tensor: t)() for tensor in held]
    return mapped(left["exp_avg"]), any(map(mapped, own))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="maps are Linux's to tell")
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_what_is_left_over_stays_in_the_file_and_what_is_loaded_does_not(tmp_path, strategy):
    found = run_ranks(2, loads_model, tmp_path / "x.ckpt", strategy=strategy)
    assert found == [(True, False)] * 2
