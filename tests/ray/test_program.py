"""What ranks run is what was started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = """
import os
import sys
from torchweft_ray import program
sys.argv = sys.argv[:1]  # as whoever parses the command line may do
found = program.of_this_process()
print(found.kind, found.name, found.arguments, found.flags)
"""


def started(folder: Path, *words: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["part/train.py", "a", "part/train.py"], "script part/train.py ('a', 'part/train.py') ()"),
        (["-Xdev", "-m", "part.train", "a"], "module part.train ('a',) ('-X', 'dev')"),
        (["-mpart.train", "-m"], "module part.train ('-m',) ()"),
        (["-m", "part"], "module part () ()"),
    ],
)
def test_what_was_started(tmp_path: Path, words: list[str], found: str) -> None:
    (tmp_path / "part").mkdir()
    for name in ("train.py", "__main__.py"):
        (tmp_path / "part" / name).write_text(SOURCE)
    out, err = started(tmp_path, *words)
    assert out.replace(", '-W', 'default')", ")") == found, err


def test_what_cannot_be_run_again(tmp_path: Path) -> None:
    _, err = started(tmp_path, "-c", SOURCE)
    assert "and here is no script in a file (python -c, or standard input); pass the" in err
