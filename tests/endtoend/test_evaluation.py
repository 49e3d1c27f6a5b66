"""Loaders on two ranks: every sample once, and on with the right ones after an interruption."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.endtoend.commands import SCRIPTS

EXAMPLE = Path(__file__).parents[2] / "examples" / "evaluation"


@pytest.mark.parametrize("how", ["drop", "mask"])
def test_every_sample_once_on_two_ranks(how: str, run, tmp_path: Path) -> None:
    result = run(sys.executable, SCRIPTS / "evaluate.py", tmp_path, how)
    assert result.status == 0, result.err
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for loader in range(4):
        seen = [rank[loader]["seen"] for rank in ranks]
        assert sorted(seen[0] + seen[1]) == list(range(9)), loader
    steps = [[loader["steps"] for loader in rank] for rank in ranks]
    assert steps == [[3, 3, 3, 3], [3, 3, 3, 3] if how == "mask" else [2, 2, 2, 2]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(workers: int, run, tmp_path: Path) -> None:
    noted = {}
    for when in ("before", "after"):
        result = run(sys.executable, SCRIPTS / "resume.py", tmp_path, when, workers)
        assert result.status == 0, result.err
        noted[when] = [
            torch.load(tmp_path / f"{when}-{rank}.pt", weights_only=True) for rank in (0, 1)
        ]
    epoch: list[int] = []
    for before, after in zip(noted["before"], noted["after"], strict=True):
        assert before["rest"] == after["rest"]
        assert len(before["rest"]) == 4
        # The epochs behind it too, of both loaders; the plain one was told to draw its second.
        assert before["next"][0] == after["next"][0]
        assert before["next"][1] == after["next"][1]
        assert before["next"] != before["first"]
        epoch += [index for batch in before["done"] + after["rest"] for index in batch]
    assert set(epoch) == set(range(23))
    assert len(epoch) == 24


def test_the_example_counts_every_image_once(run) -> None:
    command = [sys.executable, "-m", "torchweft", "run", "--accelerator", "cpu"]
    result = run(*command, "--devices", "2", "--strategy", "ddp", EXAMPLE / "evaluate.py")
    assert result.status == 0, result.err
    (line,) = result.lines
    told = re.fullmatch(r"test accuracy (\d\.\d{4}) on (\d+) of (\d+) images", line)
    assert told is not None, line
    # An odd number: shared out to two ranks in equal parts, one image would count twice.
    assert (told[2], told[3]) == ("359", "359")
    assert float(told[1]) > 0.9
    shown = (EXAMPLE / "README.md").read_text()
    assert re.search(r"^test accuracy 0\.\d{4} on 359 of 359 images$", shown, re.MULTILINE)
