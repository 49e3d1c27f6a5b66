"""``fabric.breakpoint()`` and ``fabric.memory()`` on two ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.endtoend.commands import SCRIPTS

SCRIPT = SCRIPTS / "look.py"

#: The agent's command gives its standard input to rank 0.
WAYS = {
    "python": [sys.executable, SCRIPT],
    "torchweft run": [sys.executable, "-m", "torchweft", "run", "--devices", "2", SCRIPT],
}


@pytest.mark.parametrize("way", WAYS)
def test_rank_0_is_looked_into_while_the_others_wait(way: str, run, tmp_path: Path) -> None:
    # What the debugger waits for before it goes on shows that rank 1 was held until then.
    commands = (
        "import os, time; time.sleep(1)\n"
        f"p 'others: ' + str(os.listdir({str(tmp_path)!r}))\n"
        "answer = 60\n"
        "next\n"
        "next\n"
        "p 'now: ' + str(answer)\n"
        "continue\n"
    )
    result = run(*WAYS[way], tmp_path, text=commands)
    assert result.status == 0, result.err
    assert "'others: []'" in result.out
    assert "'now: 62'" in result.out
    assert result.out.endswith("answer 62\nmemory 2 True\npeak True\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["went-on-0", "went-on-1"]


def test_quitting_ends_the_run(run, tmp_path: Path) -> None:
    result = run(*WAYS["python"], tmp_path, text="quit\n")
    assert result.status == 1
    assert "torchweft: rank 0 of 2 failed: BdbQuit" in result.err
