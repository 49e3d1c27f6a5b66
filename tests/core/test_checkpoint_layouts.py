"""Folders in which a strategy writes a model and its optimizer in a layout of its own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from torchweft import Fabric
from torchweft.api import FolderLayout, Foreign, Strategy
from torchweft.checkpoint.consolidating import consolidate
from torchweft.checkpoint.describing import describe
from torchweft.errors import CheckpointError


class OneFile(FolderLayout):
    """Of nothing but what torch says."""

    name = "one-file"

    def takes(self, module: nn.Module, optimizer: Optimizer) -> bool:
        return not hasattr(module, "by_name")

    def save(self, folder: str, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        os.mkdir(os.path.join(folder, "inside"))
        both = [module.state_dict(), optimizer.state_dict()]
        torch.save(both, os.path.join(folder, "inside", "both.pt"))
        return {"parameters": len(list(module.parameters()))}

    def find(self, path: str) -> Foreign | None:
        if not os.path.exists(os.path.join(path, "inside", "both.pt")):
            return None
        facts = {"parameters": 2, "strategy": "single_device:one_file=true"}
        return Foreign(processes=1, facts=facts, rest={"epoch": 7})

    def check(
        self, facts: Mapping[str, Any], module: nn.Module, optimizer: Optimizer | None
    ) -> None:
        here = len(list(module.parameters()))
        if facts["parameters"] != here:
            raise CheckpointError(f"{facts['parameters']} parameters there, {here} here")

    def load(self, folder: str, module: nn.Module, optimizer: Optimizer | None) -> None:
        both = torch.load(os.path.join(folder, "inside", "both.pt"), weights_only=True)
        module.load_state_dict(both[0])
        if optimizer is not None:
            optimizer.load_state_dict(both[1])


class Writing(Strategy):
    name = "writing"
    devices = ("cpu",)

    @property
    def folder_layout(self) -> FolderLayout | None:
        return OneFile()


def fabric_of(strategy: Any) -> Fabric:
    made = Fabric(accelerator="cpu", strategy=strategy)
    made.launch()
    return made


@pytest.fixture(name="fabric")
def _fabric() -> Fabric:
    return fabric_of(Writing())


def set_up(fabric: Fabric, inputs: int = 3, steps: int = 1) -> tuple[Any, Any]:
    plain = nn.Linear(inputs, 2)
    model, optimizer = fabric.setup(plain, torch.optim.Adam(plain.parameters()))
    for _ in range(steps):
        fabric.backward(model(torch.ones(1, inputs)).sum())
        optimizer.step()
    return model, optimizer


def refuses(words: str) -> Any:
    return pytest.raises(CheckpointError, match=re.escape(words))


def test_both_come_back(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = set_up(fabric)
    fabric.save(tmp_path / "x", {"all": (model, [optimizer]), "n": 1})
    fabric.save(tmp_path / "x", {"all": (model, [optimizer]), "n": 2})
    other, its = set_up(fabric, steps=0)
    state = {"all": (other, [its]), "n": 0}
    assert fabric.load(tmp_path / "x", state) == {}
    assert state["n"] == 2
    assert torch.equal(other.weight, model.weight)
    assert str(its.state_dict()) == str(optimizer.state_dict())


def test_the_manifest_names_every_file(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = set_up(fabric)
    fabric.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    manifest = json.loads((tmp_path / "x" / "torchweft.json").read_text())
    assert manifest["layouts"] == {"model": {"layout": "one-file", "parameters": 2}}
    assert "model/inside/both.pt" in manifest["files"]
    (tmp_path / "x" / "model" / "inside" / "mine").touch()
    with refuses("its folder holds more than that ('model/inside/mine'); move that away"):
        fabric.save(tmp_path / "x", {"n": 1})
    (tmp_path / "x" / "model" / "inside" / "both.pt").unlink()
    with refuses("is half a checkpoint: its file 'model/inside/both.pt' of "):
        fabric.load(tmp_path / "x")


def test_a_file_elsewhere_is_refused(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = set_up(fabric)
    fabric.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    path = tmp_path / "x" / "torchweft.json"
    written = path.read_text()
    for name in ("../both.pt", "/both.pt", "model/../../both.pt"):
        path.write_text(written.replace("model/inside/both.pt", name))
        with refuses(f"names the file {name!r}, which is elsewhere"):
            fabric.load(tmp_path / "x", {"model": model})


def test_what_is_alone_is_written_by_name(fabric: Fabric, tmp_path: Path) -> None:
    """A model, an optimizer, and a pair that the layout does not take."""
    model, optimizer = set_up(fabric)
    third, its = set_up(fabric)
    third.module.by_name = True
    state = {"model": model, "third": third, "its": its}
    fabric.save(tmp_path / "x", state)
    assert "layouts" not in json.loads((tmp_path / "x" / "torchweft.json").read_text())
    assert set(fabric.load(tmp_path / "x")["model"]) == {"weight", "bias"}
    fabric.save(tmp_path / "y", {"optimizer": optimizer})
    assert fabric.load(tmp_path / "y")["optimizer"]["state"]


def test_what_is_left_over_says_what_it_is(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = set_up(fabric)
    fabric.save(tmp_path / "x", {"model": model, "optimizer": optimizer, "n": 1})
    left = fabric.load(tmp_path / "x")
    words = "layout 'one-file', read by strategy 'writing' in 1 process"
    assert {key: str(value) for key, value in left.items()} == {
        "model": words,
        "optimizer": words,
        "n": "1",
    }
    shown = describe(tmp_path / "x")
    assert shown["parts"][0] == {
        "key": "model",
        "kind": "model",
        "layout": "one-file",
        "value": words,
    }
    assert shown["bytes"] == sum(p.stat().st_size for p in (tmp_path / "x").rglob("*.*"))


def test_others_do_not_read_it(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = set_up(fabric)
    fabric.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    way_out = (
        "load it with strategy 'writing' on 1 device and save it to a path with a suffix, such as "
        "'x.ckpt', which every strategy reads on any number of devices"
    )
    alone = fabric_of("single_device")
    with refuses(
        f"'{tmp_path}/x': cannot restore state['model'] (FabricModule): state['model'] is in the "
        "checkpoint in the layout 'one-file' of strategy 'writing', which this run's strategy does "
        f"not read; {way_out}"
    ):
        alone.load(tmp_path / "x", {"model": set_up(alone)[0]})
    with refuses(
        f"'{tmp_path}/x' holds a model in the layout 'one-file' of strategy 'writing', whose own "
        f"processes alone read it; {way_out}"
    ):
        consolidate(tmp_path / "x", tmp_path / "x.ckpt")


def test_what_does_not_fit_is_refused_before_anything_is_read(
    fabric: Fabric, tmp_path: Path
) -> None:
    model, optimizer = set_up(fabric)
    fabric.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    plain = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with refuses("cannot restore state['model'] (FabricModule): 2 parameters there, 4 here"):
        fabric.load(tmp_path / "x", {"model": fabric.setup(plain)})
    with refuses("fills models that were set up, and the Linear was not; call fabric.setup() "):
        fabric.load(tmp_path / "x", {"model": nn.Linear(3, 2)})
    with refuses("state['optimizer'] is in the checkpoint in the layout 'one-file', together with"):
        fabric.load(tmp_path / "x", {"optimizer": optimizer})
    with refuses("as the optimizer of state['model'], and was not set up with it here; call "):
        fabric.load(tmp_path / "x", {"model": model, "optimizer": set_up(fabric)[1]})


def test_a_part_is_not_the_whole(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = set_up(fabric)
    fabric.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    for inside in ("model", "model/inside", "model/inside/both.pt"):
        with refuses(f"'{tmp_path}/x/{inside}' is a part of a checkpoint; load the folder "):
            fabric.load(tmp_path / "x" / inside, {"model": model})


def test_a_folder_that_only_the_strategy_knows(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = set_up(fabric)
    (tmp_path / "x").mkdir()
    OneFile().save(str(tmp_path / "x"), model.module, optimizer.optimizer)
    other, its = set_up(fabric, steps=0)
    assert fabric.load(tmp_path / "x", {"model": other, "optimizer": its}) == {"epoch": 7}
    assert torch.equal(other.weight, model.weight)
    with refuses("is a folder, not a checkpoint"):
        fabric_of("single_device").load(tmp_path / "x", {"model": other})
