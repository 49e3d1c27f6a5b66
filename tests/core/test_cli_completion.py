"""Completion on the shell, asked for as a shell asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest


def torchweft(*arguments: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torchweft", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def complete(line: str) -> list[str]:
    words = line.split(" ")
    shown = torchweft(
        _TORCHWEFT_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1)
    )
    return [word.partition(",")[2] for word in shown.splitlines()]


def test_commands_flags_and_names() -> None:
    assert complete("torchweft pl") == ["plan", "plugins"]
    assert "--strategy" in complete("torchweft run --st")
    assert complete("torchweft run --accelerator c") == ["cpu", "cuda"]
    strategies = complete("torchweft plan --strategy ddp")
    assert strategies[0] == "ddp"
    assert "ddp_spawn" in strategies
    assert complete("torchweft run --precision 16") == ["16", "16-mixed", "16-true"]


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_the_script_for_a_shell(shell: str) -> None:
    script = torchweft("completion", shell)
    assert f"{shell}_complete" in script
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=script, text=True, timeout=60, check=False)
        assert checked.returncode == 0
