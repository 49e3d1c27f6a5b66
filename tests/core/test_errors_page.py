"""``docs/errors.md``: every wrong use on the page ends in the error that stands below it."""

from __future__ import annotations

import pathlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchweft.errors
from torchweft import Fabric, TorchweftError, shard
from torchweft.api import Precision
from torchweft.loggers import CSVLogger

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")

#: Code, the name of the error's class, its words.
USES = re.findall(r"^```python\n(.*?)\n```\n\n> `(\w+)`: (.*?)\n", PAGE, re.MULTILINE | re.DOTALL)


class HalfPrecision(Precision):
    """A precision of the user's."""


class Callback:
    """One whose attribute is no method."""

    on_epoch_end = 3


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the page says that its names are."""
    fabric = Fabric(accelerator="cpu", callbacks=[Callback()], loggers=CSVLogger(tmp_path))
    model = nn.Linear(2, 1)
    inside = nn.Linear(2, 1)
    ready, trainer = fabric.setup(inside, torch.optim.SGD(inside.parameters(), lr=0.1))
    data = torch.ones(4, 2)
    saved, truncated, unsafe = (
        tmp_path / f"{name}.ckpt" for name in ("saved", "truncated", "unsafe")
    )
    fabric.save(saved, {"model": ready, "epoch": 1})
    truncated.write_bytes(saved.read_bytes()[:200])
    torch.save({"model": ready.state_dict(), "x": pathlib.PurePosixPath("a")}, unsafe)
    return {
        "Fabric": Fabric,
        "HalfPrecision": HalfPrecision,
        "data": data,
        "fabric": fabric,
        "loader": DataLoader(TensorDataset(data), batch_size=2),
        "loss": model(data).sum(),
        "model": model,
        "nn": nn,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "other": fabric.setup(nn.Linear(3, 1)),
        "pair": Fabric(accelerator="cpu", strategy="ddp", devices=2),
        "path": tmp_path / "new.ckpt",
        "ready": ready,
        "saved": saved,
        "shard": shard,
        "torch": torch,
        "trainer": trainer,
        "truncated": truncated,
        "unsafe": unsafe,
    }


def pattern(words: str) -> str:
    return ".*".join(re.escape(part) for part in words.split("…"))


@pytest.mark.parametrize(("code", "kind", "words"), USES, ids=[use[0][:60] for use in USES])
def test_a_wrong_use_and_its_error(
    code: str, kind: str, words: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if 'accelerator="cuda"' in code and torch.cuda.is_available():
        pytest.skip("there is a GPU here, which makes this a right use")
    monkeypatch.chdir(names["path"].parent)
    with pytest.raises(TorchweftError) as raised:
        exec(code, names)
    assert type(raised.value).__name__ == kind
    assert re.fullmatch(pattern(words), str(raised.value), re.DOTALL)


def test_the_page_has_them_all() -> None:
    assert len(USES) == PAGE.count("```python\n") > 60
    listed = set(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE, re.MULTILINE))
    named = {name.strip("` ") for cell in listed for name in cell.split(",")}
    declared = {
        name
        for name, value in vars(torchweft.errors).items()
        if isinstance(value, type) and issubclass(value, TorchweftError)
    }
    assert named == declared - {"TorchweftError"}
