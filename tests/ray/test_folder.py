"""Copies of a folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from torchweft.errors import InvalidRequest
from torchweft_ray.folder import packed, unpack


def test_a_copy_has_what_ranks_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, copy = tmp_path / "folder", tmp_path / "copy"
    for name in ("pack/deep", ".git", "pack/__pycache__", "env", "runs/1"):
        (folder / name).mkdir(parents=True)
    for name in ("train.py", "pack/deep/data", ".git/HEAD", "env/pyvenv.cfg", "runs/1/last.ckpt"):
        (folder / name).write_text(name)
    (folder / "pack" / "__pycache__" / "x.pyc").touch()
    (folder / "train.py").chmod(0o755)
    (tmp_path / "outside").write_text("outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    (folder / "again").symlink_to("pack")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)
        server.bind("socket")
        archive = packed(folder, ["runs/*"])
    copy.mkdir()
    unpack(archive, copy)
    found = sorted(p.relative_to(copy).as_posix() for p in copy.rglob("*"))
    assert found == ["again", "link", "pack", "pack/deep", "pack/deep/data", "runs", "train.py"]
    assert (copy / "link").read_text() == "outside"
    assert not (copy / "link").is_symlink()
    assert (copy / "again" / "deep" / "data").read_text() == "pack/deep/data"
    assert os.access(copy / "train.py", os.X_OK)


def test_too_large_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_bytes(bytes(3 << 20))
    (tmp_path / "train.py").write_bytes(bytes(100))
    with pytest.raises(InvalidRequest) as caught:
        packed(tmp_path, [], limit=1 << 20)
    assert str(caught.value) == (
        f"the folder {tmp_path} holds 3 MiB, and launcher 'ray' copies at most 1 MiB to nodes that "
        "do not see it; most of it is in data (3 MiB), train.py (100 bytes); start the script in a "
        "smaller folder or in one that all nodes share, or name what no rank needs with "
        "launcher='ray:exclude=data'"
    )
    assert packed(tmp_path, ["data"], limit=1 << 20)
