"""``run`` of a subclass makes the processes and returns rank 0's result."""

from __future__ import annotations

import sys

import pytest

from tests.endtoend.commands import SCRIPTS


@pytest.mark.parametrize("launcher", ["fork", "spawn"])
def test_run_of_a_subclass(launcher: str, run) -> None:
    result = run(sys.executable, SCRIPTS / "subclass.py", launcher)
    shown = result.out.splitlines()
    assert shown[:2] == ["training 0 2 9.0", "special 0 2 120.0"], result.err
    assert shown[2].startswith("alone (0, 1, tensor(4.")
    assert result.status == 1
    assert "RankFailed: rank 0 of 2 failed: Misuse: Training has no run() of its own" in result.err
