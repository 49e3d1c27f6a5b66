"""Two processes end with the parameters of one, whoever makes the processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.endtoend.commands import SCRIPTS, ways

SCRIPT = SCRIPTS / "train.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The parameters of one process on the same global batches, by a loop without torchweft."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    ).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    x = torch.randn(64, 6, dtype=torch.float64)
    y = torch.randn(64, 3, dtype=torch.float64)
    for _ in range(3):
        for first in range(0, 64, 8):
            optimizer.zero_grad()
            batch = slice(first, first + 8)
            torch.nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.state_dict()


def check(path: Path, alone: dict[str, torch.Tensor], ranks: int) -> None:
    saved = torch.load(path, weights_only=True)
    assert saved["ranks"] == ranks
    assert list(saved["model"]) == list(alone)
    for name, expected in alone.items():
        assert (saved["model"][name] - expected).abs().max().item() < 1e-10, name


@pytest.mark.parametrize("way", ["python", "torchweft run", "no preload", "torchrun"])
def test_script(way: str, run, tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.ckpt"
    environ = {"DEVICES": "2"} if way == "python" else {}
    result = run(*ways(SCRIPT)[way], path, environ=environ)
    assert result.status == 0, result.err
    check(path, alone, ranks=2)


@pytest.mark.parametrize("launcher", ["fork", "spawn", "forkserver", "script"])
def test_function(launcher: str, run, tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.ckpt"
    how = [] if launcher == "script" else [launcher]
    result = run(sys.executable, SCRIPT, path, *how, environ={"DEVICES": "2"})
    assert result.status == 0, result.err
    check(path, alone, ranks=2)


def test_one_process(run, tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.ckpt"
    result = run(sys.executable, SCRIPT, path)
    assert result.status == 0, result.err
    check(path, alone, ranks=1)
