"""``torchweft run --dry-run``: one batch of every loader, through everything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.endtoend.commands import SCRIPTS

RUN = [sys.executable, "-m", "torchweft", "run", "--dry-run"]

WAYS = {
    "one process": ([], [], 10),
    "agent": (["--devices", "2"], [], 5),
    "fresh": (["--devices", "2", "--no-preload"], [], 5),
    "fork": ([], ["fork"], 5),
    "spawn": ([], ["spawn"], 5),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run(way: str, run, tmp_path: Path) -> None:
    flags, launcher, batches = WAYS[way]
    result = run(*RUN, *flags, SCRIPTS / "epochs.py", tmp_path, *launcher)
    assert result.status == 0, result.err
    assert result.lines == ["step 0", f"validated 0 {batches}"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0
    assert result.err == (
        "torchweft: dry run: a batch went through of 2 of the 3 loader(s) set up; stopped where "
        "one of them would start again\n"
    )
