"""Micro-batches on several processes train as the large batch does, with one reduction a group."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.endtoend.commands import SCRIPTS


def large_batches(rows: int, size: int) -> dict[str, torch.Tensor]:
    """The parameters of one process on whole groups, by a loop without torchweft."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = torch.randn(rows, 6, dtype=torch.float64)
    y = torch.randn(rows, 3, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        for first in range(0, rows, size):
            optimizer.zero_grad()
            group = slice(first, first + size)
            nn.functional.mse_loss(model(x[group]), y[group]).backward()
            optimizer.step()
    return model.state_dict()


# Micro-batches on each rank: 8, in whole groups, or 10, whose last group has two.
@pytest.mark.parametrize("micro_batches", [8, 10])
@pytest.mark.parametrize("ranks", [1, 2])
def test_equal_to_the_large_batch(ranks: int, micro_batches: int, run, tmp_path: Path) -> None:
    path, rows = tmp_path / "model.ckpt", 2 * micro_batches * ranks
    result = run(
        sys.executable, SCRIPTS / "accumulate.py", path, rows, environ={"DEVICES": str(ranks)}
    )
    assert result.status == 0, result.err
    saved = torch.load(path, weights_only=True)
    last = [3, 7, 9][: -(-micro_batches // 4)]
    assert saved["stepped"] == last * 3
    # Each of the two models has one bucket, which is reduced in the last of a group alone.
    assert saved["reduced"] == ([i for i in last * 3 for _ in range(2)] if ranks > 1 else [])
    expected = large_batches(rows, 8 * ranks)
    assert list(saved["model"]) == list(expected)
    for name, value in expected.items():
        assert (saved["model"][name] - value).abs().max().item() < 1e-10, name
