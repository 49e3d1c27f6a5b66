"""A run that is told to stop saves and leaves, in all ranks at the same step."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.endtoend.test_elastic import until

SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from torchweft import Fabric

folder = Path(sys.argv[1])
fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
fabric.launch()
model = fabric.setup_module(torch.nn.Linear(3, 3))
for step in range(100000):
    if fabric.should_stop:
        break
    fabric.backward(model(torch.ones(2, 3)).sum())
    if step == 3:
        (folder / f"pid-{fabric.global_rank}").write_text(str(os.getpid()))
    time.sleep(0.01)
fabric.save(folder / "saved.ckpt", {"model": model, "step": step})
assert fabric.should_stop
(folder / f"stopped-{fabric.global_rank}").write_text(str(step))
"""
WAYS = {
    "python": [sys.executable],
    "torchweft run": [sys.executable, "-m", "torchweft", "run", "--devices", "2"],
    "no preload": [sys.executable, "-m", "torchweft", "run", "--devices", "2", "--no-preload"],
}
CASES = [
    ("python", signal.SIGTERM, "command", 143),
    ("python", signal.SIGUSR1, "command", 0),
    ("python", signal.SIGTERM, "rank", 0),
    ("torchweft run", signal.SIGTERM, "command", 143),
    ("torchweft run", signal.SIGUSR1, "command", 0),
    ("torchweft run", signal.SIGUSR2, "rank", 0),
    ("no preload", signal.SIGTERM, "command", 143),
    ("no preload", signal.SIGUSR1, "command", 0),
]


@pytest.mark.parametrize(("way", "number", "to", "status"), CASES)
def test_all_ranks_stop_at_the_same_step(
    way: str, number: signal.Signals, to: str, status: int, tmp_path: Path, start
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = start(*WAYS[way], script, tmp_path)
    pids = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
    while not all(path.exists() and path.read_text() for path in pids):
        assert command.popen.poll() is None, command.finish().err
        time.sleep(0.02)
    os.kill(command.popen.pid if to == "command" else int(pids[1].read_text()), number)
    done = command.finish()
    assert (done.status, done.err) == (status, "")
    steps = {(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)}
    assert len(steps) == 1
    assert int(steps.pop()) > 3
    assert (tmp_path / "saved.ckpt").exists()


def test_one_process_stops_too_and_handlers_are_called(tmp_path: Path, start) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal\n"
        "from torchweft import Fabric\n"
        "signal.signal(signal.SIGUSR1, lambda number, frame: print('mine'))\n"
        "fabric = Fabric(accelerator='cpu')\n"
        "for step in range(9):\n"
        "    if fabric.should_stop:\n"
        "        break\n"
        "    if step == 4:\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print(step)\n"
    )
    done = start(sys.executable, script).finish()
    assert (done.status, done.out) == (0, "mine\n6\n"), done.err


def test_without_it_the_signal_ends_the_run(tmp_path: Path, start) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("    if fabric.should_stop:\n        break\n", ""))
    command = start(sys.executable, script, tmp_path)
    while not (tmp_path / "pid-0").exists():
        assert command.popen.poll() is None, command.finish().err
        time.sleep(0.02)
    os.kill(command.popen.pid, signal.SIGTERM)
    assert command.finish().status == 143
    assert not (tmp_path / "saved.ckpt").exists()


def test_who_was_told_to_end_does_not_begin_anew(start, tmp_path: Path) -> None:
    """Whatever fails while it saves."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from torchweft import Fabric\n"
        "fabric = Fabric(accelerator='cpu', strategy='ddp')\n"
        "fabric.launch()\n"
        "while not fabric.should_stop:\n"
        "    Path(sys.argv[1], f'rank-{fabric.global_rank}').touch()\n"
        "    time.sleep(0.05)\n"
        "raise OSError('no space left')\n"
    )
    command = [sys.executable, "-m", "torchweft", "run", "--devices", "2", "--max-restarts", "2"]
    job = start(*command, script, tmp_path)
    until(lambda: all((tmp_path / f"rank-{rank}").exists() for rank in (0, 1)), job)
    job.popen.terminate()
    done = job.finish()
    assert done.status == 1
    assert done.err.count("torchweft: ") == 1, done.err
    assert "of 2 failed: OSError: no space left" in done.err
