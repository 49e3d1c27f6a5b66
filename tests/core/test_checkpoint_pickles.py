"""A folder whose description says that a tensor is something pickled runs no code."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)

from torchweft import Fabric
from torchweft.checkpoint.consolidating import consolidate
from torchweft.errors import CheckpointError


class Evil:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def planted(folder: Path, path: Path, entry: str, described: Any) -> None:
    """Have ``entry`` of a folder be a pickle that makes a folder at ``path``."""
    data = io.BytesIO()
    torch.save(Evil(path), data)
    (folder / "evil.distcp").write_bytes(data.getvalue())
    metadata = Metadata(
        state_dict_metadata={entry: described},
        planner_data={entry: tuple(entry.split(".", 1))},
        storage_data={
            MetadataIndex(entry): _StorageInfo("evil.distcp", 0, len(data.getvalue())),
        },
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_tensor_that_is_said_to_be_pickled(fabric: Fabric, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    fabric.save(folder, {"model": fabric.setup(nn.Linear(1, 1, bias=False))})
    planted(folder, tmp_path / "ran", "model.weight", BytesStorageMetadata())
    manifest = json.loads((folder / "torchweft.json").read_text())
    manifest["files"] = {
        each.name: each.stat().st_size
        for each in os.scandir(folder)
        if each.name in manifest["files"]
    }
    (folder / "torchweft.json").write_text(json.dumps(manifest))
    words = "does not say that 'model.weight' is a tensor, which it has to be"
    model = fabric.setup(nn.Linear(1, 1, bias=False))
    for load in (
        lambda: fabric.load(folder),
        lambda: fabric.load(folder, {"model": model}),
        lambda: consolidate(folder, tmp_path / "x.ckpt"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load()
    assert not (tmp_path / "ran").exists()


def test_something_pickled_that_looks_like_a_tensor(fabric: Fabric, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    described: Any = BytesStorageMetadata()
    described.chunks, described.size = [], torch.Size([1, 1])
    described.properties = TensorProperties()
    planted(folder, tmp_path / "ran", "model.weight", described)
    with pytest.raises(CheckpointError):
        fabric.load(folder)
    assert not (tmp_path / "ran").exists()
