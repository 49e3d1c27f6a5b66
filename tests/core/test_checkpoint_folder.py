"""torchweft.checkpoint.folder: whole or not at all, and read without running code from it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from torchweft import Fabric
from torchweft.checkpoint import replacing
from torchweft.checkpoint.metadata import read_metadata
from torchweft.checkpoint.reading import Folder
from torchweft.checkpoint.replacing import put_aside
from torchweft.errors import CheckpointError, InvalidRequest, RankFailed
from torchweft.testing import run_ranks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: Any) -> Any:
        return self.head(self.norm(self.embed(index)))


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def trained(fabric: Fabric, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = Tied()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1 + seed))
    fabric.backward(model(torch.arange(6)).sum())
    optimizer.step()
    return model, optimizer


def state_of(fabric: Fabric, seed: int) -> dict[str, Any]:
    model, optimizer = trained(fabric, seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return bool(torch.equal(one, other) and one.dtype == other.dtype)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def refuses(words: str) -> Any:
    return pytest.raises(CheckpointError, match=f"^{re.escape(words)}")


# -- what is saved is loaded ---------------------------------------------------------------------


def test_a_path_without_a_suffix_is_a_folder(fabric: Fabric, tmp_path: Path) -> None:
    state = state_of(fabric, 0)
    ema = {"x": torch.ones(2, 3), "pair": (1, torch.zeros(2))}
    fabric.save(tmp_path / "run" / "step", {**state, "epoch": 3, "ema": ema})
    assert sorted(os.listdir(tmp_path / "run")) == ["step"]
    names = {".metadata", "__0_0.distcp", "torchweft.json", "values.ckpt"}
    assert set(os.listdir(tmp_path / "run" / "step")) == names
    other = state_of(fabric, 1)
    rest = fabric.load(tmp_path / "run" / "step", {**other, "ema": None})
    assert rest == {"epoch": 3}
    for key, value in state.items():
        assert equal(value.state_dict(), other[key].state_dict()), key
    assert other["optimizer"].param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", ["x.ckpt", "x.1", ".ckpt", "x/.ckpt"])
def test_a_name_with_a_dot_is_a_file(fabric: Fabric, tmp_path: Path, name: str) -> None:
    fabric.save(tmp_path / name, {"n": 1})
    assert (tmp_path / name).is_file()
    assert fabric.load(tmp_path / name) == {"n": 1}


def test_a_folder_of_a_near_name_is_named(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "last", {"n": 1})
    (tmp_path / "empty").mkdir()
    with refuses(f"there is no checkpoint '{tmp_path}/lats'; '{tmp_path}' holds 'last'"):
        fabric.load(tmp_path / "lats")


def test_without_a_state_everything_is_returned_as_by_a_file(
    fabric: Fabric, tmp_path: Path
) -> None:
    state = {**state_of(fabric, 0), "models": [nn.Linear(2, 2), {"b": nn.Linear(1, 1)}], "n": 1.5}
    fabric.save(tmp_path / "x", state)
    fabric.save(tmp_path / "x.ckpt", state)
    folder, file = fabric.load(tmp_path / "x"), fabric.load(tmp_path / "x.ckpt")
    assert equal(folder, file)
    assert folder["model"]._metadata == file["model"]._metadata
    assert folder["model"]["embed.weight"] is folder["model"]["head.weight"]


def test_objects_that_were_not_set_up_are_filled(fabric: Fabric, tmp_path: Path) -> None:
    plain = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(plain.parameters())
    plain(torch.ones(3)).sum().backward()
    optimizer.step()
    fabric.save(tmp_path / "x", {"model": plain, "inner": {"optimizer": optimizer}})
    other = nn.Linear(3, 2)
    its = torch.optim.Adam(other.parameters(), lr=1.0)
    assert fabric.load(tmp_path / "x", {"model": other, "inner": {"optimizer": its}}) == {}
    assert torch.equal(plain.weight, other.weight)
    assert equal(optimizer.state_dict(), its.state_dict())
    ready = fabric.setup(nn.Linear(3, 2))
    fabric.load(tmp_path / "x", {"model": ready})
    assert torch.equal(ready.weight, plain.weight)


def test_dtypes_are_those_of_the_model(fabric: Fabric, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    fabric.save(tmp_path / "x", {"model": model})
    other = nn.Linear(3, 2).double()
    fabric.load(tmp_path / "x", {"model": other})
    assert other.weight.dtype == torch.float64
    assert torch.equal(other.weight, model.weight.double())


def test_what_several_names_share_is_stored_once(fabric: Fabric, tmp_path: Path) -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(200, 200, bias=False)
            self.b = nn.Linear(200, 200, bias=False)
            self.b.weight = self.a.weight

    fabric.save(tmp_path / "x", {"model": Big()})
    assert 160_000 < (tmp_path / "x" / "__0_0.distcp").stat().st_size < 170_000
    other = Big()
    fabric.load(tmp_path / "x", {"model": other})


def test_the_filter_chooses(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = trained(fabric, 0)
    filters = {
        "model": lambda name, value: "norm" in name and value.dim() > 0,
        "optimizer": lambda name, value: name == "param_groups",
        "values": lambda name, value: value > 1,
    }
    state = {"model": model, "optimizer": optimizer, "values": {"a": 1, "b": 2}}
    fabric.save(tmp_path / "x", state, filters)
    fabric.save(tmp_path / "x.ckpt", state, filters)
    assert equal(fabric.load(tmp_path / "x"), fabric.load(tmp_path / "x.ckpt"))
    with refuses(
        f"cannot save to '{tmp_path}/y': filter is given for state['n'], which is of type int and "
        "has no entries to choose from"
    ):
        fabric.save(tmp_path / "y", {"n": 3}, {"n": lambda name, value: True})
    with pytest.raises(InvalidRequest, match="filter has the key 'modle'"):
        fabric.save(tmp_path / "y", {"model": model}, {"modle": lambda name, value: True})
    assert not (tmp_path / "y").exists()


def test_the_manifest_says_what_there_is(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "x", {"model": nn.Linear(3, 2)})
    manifest = json.loads((tmp_path / "x" / "torchweft.json").read_text())
    files = manifest.pop("files")
    assert files == {
        name: (tmp_path / "x" / name).stat().st_size
        for name in (".metadata", "__0_0.distcp", "values.ckpt")
    }
    assert manifest == {
        "format": 1,
        "torchweft": manifest["torchweft"],
        "torch": torch.__version__,
        "world_size": 1,
        "strategy": "single_device",
        "precision": "32-true",
        "entries": {
            "model.weight": {
                "shape": [2, 3],
                "dtype": "float32",
                "parts": [{"file": "__0_0.distcp", "offset": [0, 0], "shape": [2, 3]}],
            },
            "model.bias": {
                "shape": [2],
                "dtype": "float32",
                "parts": [{"file": "__0_0.distcp", "offset": [0], "shape": [2]}],
            },
        },
    }


# -- folders of torch.distributed.checkpoint -----------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_it_and_its_own_folders_are_read(fabric: Fabric, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    fabric.save(tmp_path / "ours", {"model": model})
    into = {"model": nn.Linear(3, 2).state_dict()}
    dcp.load(into, checkpoint_id=tmp_path / "ours")
    assert equal(into["model"], model.state_dict())

    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    dcp.save(state, checkpoint_id=tmp_path / "theirs")
    other = nn.Linear(3, 2)
    its = torch.optim.Adam(other.parameters(), lr=1.0)
    rest = fabric.load(tmp_path / "theirs", {"model": other, "optimizer": its})
    assert rest == {"epoch": 3}
    assert torch.equal(other.weight, model.weight)
    assert equal(its.state_dict(), optimizer.state_dict())

    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "raw")
    ready = fabric.setup(nn.Linear(3, 2))
    fabric.load_raw(tmp_path / "raw", ready)
    assert torch.equal(ready.weight, model.weight)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_no_code_of_a_folder_of_torch_is_run(fabric: Fabric, tmp_path: Path) -> None:
    dcp.save({"a": complex(1, 2), "b": Mine(1)}, checkpoint_id=tmp_path / "theirs")
    with refuses(f"'b' cannot be read from '{tmp_path}/theirs/__0_0.distcp': UnpicklingError"):
        fabric.load(tmp_path / "theirs")
    assert fabric.load(tmp_path / "theirs", weights_only=False)["b"].value == 1


class Mine:
    def __init__(self, value: int) -> None:
        self.value = value


# -- what does not fit ---------------------------------------------------------------------------


def test_what_does_not_fit_is_said_before_anything_is_read(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "x", {"model": nn.Linear(2, 4)})
    # As long as it was, and nothing that can be read.
    stored = tmp_path / "x" / "__0_0.distcp"
    stored.write_bytes(bytes(stored.stat().st_size))
    place = f"'{tmp_path}/x': cannot restore state['model'] (Linear): "
    with refuses(
        f"{place}the checkpoint is of another model: 'weight' is (4, 2) in the checkpoint and "
        "(3, 2) in the model, 'bias' is (4,) in the checkpoint and (3,) in the model"
    ):
        fabric.load(tmp_path / "x", {"model": nn.Linear(2, 3)})
    with refuses(f"{place}the tensors in '{tmp_path}/x' cannot be read: "):
        fabric.load(tmp_path / "x", {"model": nn.Linear(2, 4)})


def test_what_is_missing_is_said(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "x", {"model": nn.Linear(2, 4, bias=False)})
    with refuses(
        f"'{tmp_path}/x': the checkpoint has no 'modle'; did you mean 'model'? it holds 'model'. "
        "Pass strict=False to load without"
    ):
        fabric.load(tmp_path / "x", {"modle": nn.Linear(2, 4)})
    with refuses(
        f"'{tmp_path}/x': cannot restore state['model'] (Linear): the checkpoint has no 'bias'; "
        "the checkpoint holds 'weight'"
    ):
        fabric.load(tmp_path / "x", {"model": nn.Linear(2, 4)})
    assert fabric.load(tmp_path / "x", {"model": nn.Linear(2, 4)}, strict=False) == {}
    with refuses(
        f"'{tmp_path}/x': the checkpoint holds 'model', not the state of one Linear alone; load it "
        "with a dict, such as {'model': model}"
    ):
        fabric.load_raw(tmp_path / "x", nn.Linear(2, 4))


# -- a folder that is no checkpoint --------------------------------------------------------------


def test_half_a_checkpoint_is_refused(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "x", {"model": nn.Linear(2, 4)})
    stored = tmp_path / "x" / "__0_0.distcp"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1])
    with refuses(
        f"'{tmp_path}/x' is half a checkpoint: its file '__0_0.distcp' has {len(whole) - 1} bytes "
        f"of {len(whole)}; copy the folder again as a whole, or load another one"
    ):
        fabric.load(tmp_path / "x")
    stored.unlink()
    with refuses(
        f"'{tmp_path}/x' is half a checkpoint: its file '__0_0.distcp' of {len(whole)} bytes is "
        "missing; copy"
    ):
        fabric.load(tmp_path / "x")
    (tmp_path / "x" / "torchweft.json").unlink()
    with refuses(f"'{tmp_path}/x' is half a checkpoint: it has no 'torchweft.json', which is"):
        fabric.load(tmp_path / "x")
    (tmp_path / "x" / "torchweft.json").write_text("{")
    with refuses(f"'{tmp_path}/x/torchweft.json' is damaged: "):
        fabric.load(tmp_path / "x")
    (tmp_path / "x" / "torchweft.json").write_text('{"format": 1}')
    with refuses(f"'{tmp_path}/x/torchweft.json' is not a manifest that torchweft wrote"):
        fabric.load(tmp_path / "x")
    (tmp_path / "x" / "torchweft.json").write_text('{"format": 2}')
    with refuses(f"'{tmp_path}/x' is of format 2, and this torchweft reads up to 1; it was"):
        fabric.load(tmp_path / "x")


def test_the_folder_that_was_meant_is_named(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "run" / "step1", {"n": 1})
    fabric.save(tmp_path / "run" / "step2", {"n": 2})
    with refuses(
        f"'{tmp_path}/run' is a folder with checkpoints in it, not one itself; it holds "
        f"'{tmp_path}/run/step1', '{tmp_path}/run/step2'"
    ):
        fabric.load(tmp_path / "run")
    with refuses(f"'{tmp_path}/run/step1/values.ckpt' is a part of a checkpoint; load the folder "):
        fabric.load(tmp_path / "run" / "step1" / "values.ckpt")
    (tmp_path / "run" / "step1" / "below").mkdir()
    with refuses(f"'{tmp_path}/run/step1/below' is a part of a checkpoint; load the folder "):
        fabric.load(tmp_path / "run" / "step1" / "below")
    with refuses(f"'{tmp_path}' is a folder, not a checkpoint; '{tmp_path}' holds no files"):
        fabric.load(tmp_path)


def test_what_would_be_lost_is_not_replaced(fabric: Fabric, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with refuses(
        f"cannot save to '{tmp_path}/file': it is a file, and a path without a suffix means a "
        "folder; remove the file, or write one file by a path with a suffix, such as 'file.ckpt'"
    ):
        fabric.save(tmp_path / "file", {"n": 1})
    (tmp_path / "run").mkdir()
    fabric.save(tmp_path / "run", {"n": 1})  # an empty folder
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with refuses(
        f"cannot save to '{tmp_path}/run': the checkpoint there would be replaced, and its folder "
        "holds more than that ('notes.txt'); move that away, or name a new folder"
    ):
        fabric.save(tmp_path / "run", {"n": 2})
    assert fabric.load(tmp_path / "run") == {"n": 1}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").write_text("mine")
    with refuses(
        f"cannot save to '{tmp_path}/other': it is a folder that is no checkpoint, and would be "
        "replaced with all that it holds ('a'); name a new folder, such as 'other/last'"
    ):
        fabric.save(tmp_path / "other", {"n": 1})
    with refuses("cannot save to '/proc/none/x': No such file or directory"):
        fabric.save("/proc/none/x", {"n": 1})
    with pytest.raises(CheckpointError, match="'s3:' begins an address"):
        fabric.save("s3://bucket/x", {"n": 1})
    (tmp_path / "a.ckpt").mkdir()
    with refuses(f"cannot save to '{tmp_path}/a.ckpt': it is a folder; name a file in it"):
        fabric.save(tmp_path / "a.ckpt", {"n": 1})


def test_a_value_that_cannot_be_written_is_named(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "x", {"n": 1})
    with refuses(f"cannot save to '{tmp_path}/x': state['hook'] is of type function, and it"):
        fabric.save(tmp_path / "x", {"hook": lambda: 3})
    with refuses(f"cannot save to '{tmp_path}/x': state['model']['weight'] is on the meta device"):
        fabric.save(tmp_path / "x", {"model": nn.Linear(1, 1, device="meta")})
    assert fabric.load(tmp_path / "x") == {"n": 1}
    assert os.listdir(tmp_path) == ["x"]


# -- code in the folder --------------------------------------------------------------------------


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_no_code_from_the_description_is_run(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "x", {"model": nn.Linear(1, 1)})
    planted = pickle.dumps(Evil(tmp_path / "ran"))
    described = tmp_path / "x" / ".metadata"
    described.write_bytes(planted + bytes(described.stat().st_size))
    with pytest.raises(CheckpointError) as caught:
        fabric.load(tmp_path / "x")
    assert (
        f"the checkpoint's '.metadata' names {os.system.__module__}.system, which is no part of "
        "the description of tensors; loading it may run code, and it was not loaded"
    ) in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "serialization"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "torch"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
        ("pathlib", "os"),
        ("collections", "abc"),
    ],
)
def test_only_descriptions_are_made(tmp_path: Path, module: str, name: str) -> None:
    words = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + b"".join(words) + b"\x93.")
    with refuses(f"the checkpoint's '.metadata' names {module}.{name}, which is no part of"):
        read_metadata(str(tmp_path))


def test_the_description_points_at_nothing_outside(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "x", {"model": nn.Linear(1, 1)})
    described = tmp_path / "x" / ".metadata"
    moved = described.read_bytes().replace(b"\x0c__0_0.distcp", b"\x0c../0.distcp_")
    assert len(moved) == described.stat().st_size
    described.write_bytes(moved)
    with pytest.raises(CheckpointError, match=r"points at '\.\./0\.distcp_', which is not a file"):
        fabric.load(tmp_path / "x")
    described.write_bytes(b"nothing" + bytes(len(moved)))
    with pytest.raises(CheckpointError, match=r"\.metadata' is damaged: UnpicklingError"):
        fabric.load(tmp_path / "x")
    described.write_bytes(pickle.dumps({}) + bytes(len(moved)))
    with pytest.raises(CheckpointError, match=r"is not what torch\.distributed\.checkpoint write"):
        fabric.load(tmp_path / "x")


# -- whole or not at all -------------------------------------------------------------------------


def killed(fabric: Fabric, path: Path, moment: int, exchange: bool) -> int:
    """Save, and be killed as one step or another begins; returns the number of steps."""
    count = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    exchanging = replacing._exchange if exchange else lambda one, other: False
    replacing._exchange = counted(exchanging)
    for module, name in ((os, "mkdir"), (os, "fsync"), (os, "rename"), (shutil, "rmtree")):
        setattr(module, name, counted(getattr(module, name)))
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 2.0)
    fabric.save(path, {"model": model, "n": 2})
    return count


@pytest.mark.parametrize("exchange", [True, False])
def test_a_save_that_is_killed_leaves_one_whole_checkpoint(
    fabric: Fabric, tmp_path: Path, exchange: bool
) -> None:
    path = tmp_path / "x"
    old = nn.Linear(3, 2)
    nn.init.ones_(old.weight)
    found = []
    steps = None
    for moment in range(1, 30):
        if not found or found[-1] == 2:
            fabric.save(path, {"model": old, "n": 1})
        with contextlib.suppress(RankFailed):
            steps = run_ranks(1, killed, path, moment, exchange)[0]
            break
        found.append(after_a_kill(fabric, path))
    # What a killed save left is swept by the next one, which may take a step more.
    assert steps is not None
    assert len(found) - 1 <= steps <= len(found) + 1
    # Each file is flushed before the new one takes the old one's place.
    assert found == sorted(found)
    assert found.count(1) >= 7
    assert found.count(2) >= 1
    # What the killed ones left behind is gone with the next.
    assert os.listdir(tmp_path) == ["x"]


def after_a_kill(fabric: Fabric, path: Path) -> int:
    """Which of the two is there, having followed what the error says where none is."""
    if not path.exists():
        with refuses(
            f"there is no checkpoint '{path}', since a save that was to replace it was killed; "
        ) as caught:
            fabric.load(path)
        aside = re.search(r"rename '(.+)' to '(.+)'", str(caught.value))
        assert aside is not None
        os.rename(*aside.groups())
    loaded = fabric.load(path)
    n: int = loaded["n"]
    assert torch.equal(loaded["model"]["weight"], torch.full((2, 3), float(n)))
    return n


def test_what_another_save_is_writing_is_left(fabric: Fabric, tmp_path: Path) -> None:
    aside = replacing.Aside(str(tmp_path / "x"))
    dead = tmp_path / ".x.1-00000000.tmp"
    dead.mkdir()
    (tmp_path / ".x.1-0000000.tmp").mkdir()
    fabric.save(tmp_path / "x", {"n": 1})
    assert not dead.exists()
    assert sorted(os.listdir(tmp_path)) == sorted(
        [os.path.basename(aside.path), ".x.1-0000000.tmp", "x"]
    )
    aside.close()


def test_long_names_that_begin_alike_are_left_alone(
    fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "an-experiment-whose-name-is-rather-long-number-"
    fabric.save(tmp_path / f"{name}1", {"n": 1})
    # As by a save that was killed between two renames.
    rename = os.rename

    def killed(source: Any, target: Any) -> None:
        if not str(source).endswith(".old"):
            rename(source, target)
        if str(target).endswith(".old"):
            raise KeyboardInterrupt

    monkeypatch.setattr(replacing, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        fabric.save(tmp_path / f"{name}1", {"n": 2})
    monkeypatch.undo()
    with refuses(f"there is no checkpoint '{tmp_path}/{name}2'; "):
        fabric.load(tmp_path / f"{name}2")
    fabric.save(tmp_path / f"{name}3", {"n": 3})
    fabric.save(tmp_path / f"{name}3", {"n": 3})
    assert put_aside(str(tmp_path / f"{name}2")) == ""
    os.rename(put_aside(str(tmp_path / f"{name}1")), tmp_path / f"{name}1")
    assert fabric.load(tmp_path / f"{name}1") == {"n": 1}


def test_a_reader_never_meets_half_of_two(fabric: Fabric, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    fabric.save(tmp_path / "x", {"model": model, "n": 1})
    opened = Folder(str(tmp_path / "x"))
    fabric.save(tmp_path / "x", {"model": nn.Linear(2, 2), "n": 2})
    words = f"'{tmp_path}/x' was replaced while it was read; load it again"
    with refuses(words):
        opened.whole(opened.content)
    # Also where the other does not fit, or there is none.
    opened = Folder(str(tmp_path / "x"))
    fabric.save(tmp_path / "x", {"model": nn.Linear(3, 4), "n": 3})
    with refuses(words):
        opened.for_model(model.named_parameters, opened.content["model"])
    opened = Folder(str(tmp_path / "x"))
    shutil.rmtree(tmp_path / "x")
    with refuses(words):
        opened.whole(opened.content)


def test_a_failed_exchange_leaves_the_old_one(
    fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabric.save(tmp_path / "x", {"n": 1})
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp") and str(target) == str(tmp_path / "x"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(replacing, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", failing)
    with refuses(f"cannot save to '{tmp_path}/x': No space left on device"):
        fabric.save(tmp_path / "x", {"n": 2})
    assert os.listdir(tmp_path) == ["x"]
    assert fabric.load(tmp_path / "x") == {"n": 1}


def test_a_symbolic_link_is_followed(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "x", {"n": 1})
    (tmp_path / "last").symlink_to("x")
    fabric.save(tmp_path / "last", {"n": 2})
    assert (tmp_path / "last").is_symlink()
    assert fabric.load(tmp_path / "x") == {"n": 2}
