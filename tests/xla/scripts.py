"""Scripts in fresh processes, on XLA's client for the processor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from torchweft.testing.commands import clean_environment

__all__ = ["PREAMBLE", "fails", "script", "told"]

#: What every script here begins with.
PREAMBLE = """
import json
import sys
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchweft import Fabric


def tell(**what):
    print("TOLD " + json.dumps(what), flush=True)

"""


def script(
    text: str, tmp_path: Path, *words: str, devices: int | None = 1, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; ``devices`` None leaves the environment without a client."""
    path = tmp_path / "train.py"
    path.write_text(PREAMBLE + text)
    own = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)} if devices else {}
    clean = {name: value for name, value in clean_environment().items() if name != "PJRT_DEVICE"}
    return subprocess.run(
        [sys.executable, *words, str(path)],
        env={**clean, **own, **environ, "PYTHONUNBUFFERED": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a script that ended well told."""
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("TOLD "):
            found.update(json.loads(line[5:]))
    return found


def fails(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of a script that failed."""
    assert done.returncode != 0, done.stdout
    return done.stderr.rstrip().splitlines()[-1]
