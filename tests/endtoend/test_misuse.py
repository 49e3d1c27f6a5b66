"""Wrong order of calls that shows only where there are several processes."""

from __future__ import annotations

import sys
from pathlib import Path

NO_SETUP = """
import torch
from torchweft import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
fabric.launch()
model = torch.nn.Linear(2, 1)
fabric.backward(model(torch.ones(1, 2)).sum())
"""


def test_backward_of_a_model_that_was_not_set_up(run, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(NO_SETUP)
    result = run(sys.executable, script)
    assert result.status == 1
    assert (
        "torchweft: rank 0 of 2 failed: Misuse: fabric.backward(loss) came before any model was "
        "set up, so that every process would train a model of its own; pass the model to "
        "fabric.setup(model, optimizer) first, or call loss.backward() where that is meant"
    ) in result.err
