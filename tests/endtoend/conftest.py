"""Fixtures that run real commands."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.endtoend.commands import Command, Result, clean_environment


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Start a command; whatever is left of it at the end of the test is killed and reported."""
    commands: list[Command] = []

    def begin(
        *command: str | Path,
        environ: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        cwd: Path | None = None,
    ) -> Command:
        started = Command([str(c) for c in command], clean_environment(environ), stdin, cwd)
        commands.append(started)
        return started

    yield begin
    left = [line for command in commands for line in command.left()]
    for command in commands:
        command.kill()
        if command.popen.poll() is None:
            command.popen.wait()
        for stream in (command.popen.stdin, command.popen.stdout, command.popen.stderr):
            if stream is not None:
                stream.close()
    assert not left, "left running: " + "; ".join(left)


@pytest.fixture
def run(start: Callable[..., Command]) -> Callable[..., Result]:
    """Run a command to its end."""

    def to_the_end(
        *command: str | Path,
        environ: Mapping[str, str] | None = None,
        timeout: float = 90,
        text: str | None = None,
        cwd: Path | None = None,
    ) -> Result:
        stdin = subprocess.PIPE if text is not None else subprocess.DEVNULL
        return start(*command, environ=environ, stdin=stdin, cwd=cwd).finish(timeout, text)

    return to_the_end
