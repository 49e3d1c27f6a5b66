"""``docs/migrate.md``: what stands in the right column of each row is right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from torchweft import Fabric
from torchweft.cli.run import run

PAGE = (Path(__file__).parents[2] / "docs" / "migrate.md").read_text(encoding="utf-8")

ROWS = re.findall(r"^\| (`.*|a subclass.*) \| (.*) \|$", PAGE, re.MULTILINE)

SNIPPETS = [snippet for _, ours in ROWS for snippet in re.findall(r"`([^`]+)`", ours)]

#: Words that are no statements by themselves.
WORDS = {"should_step", "torchweft run", "stack=True"}

COMMANDS = [snippet for snippet in SNIPPETS if snippet.startswith("torchweft run ")]

CODE = [s for s in dict.fromkeys(SNIPPETS) if s not in WORDS and s not in COMMANDS]


class Collected:
    """Takes what is logged."""

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.last = metrics


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the page says that its names are."""
    fabric = Fabric(accelerator="cpu", loggers=Collected())
    inside = nn.Linear(2, 1)
    plain_optimizer = torch.optim.SGD(inside.parameters(), lr=0.1)
    scheduler = StepLR(plain_optimizer, 1)
    model, optimizer, scheduler = fabric.setup(inside, plain_optimizer, scheduler=scheduler)
    plain = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
    loss = model(torch.ones(1, 2)).sum()
    fabric.backward(loss, retain_graph=True)
    path, raw = tmp_path / "file.ckpt", tmp_path / "raw"
    fabric.save(path, {"model": model})
    torch.save(inside.state_dict(), raw)
    return {
        "Block": nn.Linear,
        "Fabric": Fabric,
        "MixedPrecisionPolicy": MixedPrecisionPolicy,
        "divide": lambda model, mesh: {},
        "fabric": fabric,
        "folder": tmp_path / "folder",
        "loader": fabric.setup_dataloaders(plain),
        "loss": loss,
        "model": model,
        "net": nn.Linear(2, 1),
        "optimizer": optimizer,
        "path": path,
        "plain": DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2),
        "raw": raw,
        "scheduler": scheduler,
        "tensor": torch.ones(3, 2),
        "torch": torch,
        "train": lambda fabric, number: number,
    }


@pytest.mark.parametrize("code", CODE)
def test_a_row(code: str, names: dict[str, Any]) -> None:
    exec("from torchweft_cuda.ddp import DDPStrategy", names)
    exec("from torchweft_cuda.fsdp import FSDPStrategy", names)
    exec(f"{code} pass" if code.endswith(":") else code, names)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    arguments = shlex.split(command)[2:]
    context = run.make_context("run", [str(script) if a == "train.py" else a for a in arguments])
    given = context.params
    assert str(script) in (given["script"], *given["arguments"])
    assert given["devices"] == "2" or given["script"] == "model"


def test_no_row_is_left_out() -> None:
    assert len(ROWS) == PAGE.count("\n| ") - 2
    assert len(CODE) > 40
