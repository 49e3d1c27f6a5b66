"""Again and again. Short here; ``TORCHWEFT_SOAK=1`` runs them at full length."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.endtoend.commands import SCRIPTS, ways

FULL = os.environ.get("TORCHWEFT_SOAK") == "1"
LAUNCHES = 100 if FULL else 4
RESTARTS = 20 if FULL else 4


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["python", "torchweft run"])
def test_launches_of_four_ranks(way: str, run, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch\n"
        "from torchweft import Fabric\n"
        "devices = os.environ.get('DEVICES', 'auto')\n"
        "fabric = Fabric(accelerator='cpu', devices=devices, strategy='ddp')\n"
        "fabric.launch()\n"
        "model = fabric.setup(torch.nn.Linear(2, 2))\n"
        "fabric.backward(model(torch.ones(1, 2)).sum())\n"
        "total = fabric.all_reduce(fabric.global_rank, reduce_op='sum')\n"
        "fabric.print(int(total))\n"
    )
    environ = {"DEVICES": "4"} if way == "python" else {}
    for launch in range(LAUNCHES):
        result = run(*ways(script, ranks=4)[way], environ=environ, timeout=60)
        assert (result.status, result.out, result.err) == (0, "6\n", ""), f"launch {launch}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [[], ["--no-preload"]], ids=["preload", "fresh"])
def test_restarts_after_a_killed_rank(kind: list[str], run) -> None:
    command = [sys.executable, "-m", "torchweft", "run", *kind, "--devices", "2"]
    result = run(
        *command,
        "--max-restarts",
        str(RESTARTS),
        SCRIPTS / "restarts.py",
        str(RESTARTS),
        timeout=600,
    )
    assert result.status == 0, result.err
    assert sorted(result.lines) == [f"attempt {RESTARTS} rank {r} of 2" for r in (0, 1)]
    assert result.err == ""


def test_restarts_that_run_out(run) -> None:
    command = [sys.executable, "-m", "torchweft", "run", "--devices", "2"]
    result = run(*command, "--max-restarts", "1", SCRIPTS / "restarts.py", "9")
    assert result.status == 137
    assert result.err.count("torchweft: rank 1 of 2 failed: killed by signal 9 (SIGKILL)") == 1
