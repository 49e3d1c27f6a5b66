"""Pages of the documentation whose code blocks are run, in their order, in one folder.

What becomes of a block follows from the word behind its fence and from its first line:

- a first line ``# folder/name.py`` makes it that file, whatever the word is;
- ``python`` is executed, all such blocks of a page in one namespace;
- ``pycon`` is a session of Python's prompt, in the same namespace: what it prints is compared;
- ``console`` has commands behind ``$``, run by a shell. Output that is shown is compared; a command
  without output shown has to succeed.

``…`` stands for any text in what is compared, and blanks count once.
"""

from __future__ import annotations
import __future__

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Block", "Runner", "blocks", "environment"]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ((?:[\w.-]+/)*[\w.-]+\.\w+)\n")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A code block of a page.

    Attributes:
        word: behind its fence.
        text: what is in it.
        place: page and line.
    """

    word: str
    text: str
    place: str

    @property
    def file(self) -> str:
        """The path that its first line names; empty where it names none."""
        found = _FILE.match(self.text)
        return found[1] if found else ""


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(
            word=fence[1],
            text=fence[2],
            place=f"{page.name}:{text.count(chr(10), 0, fence.start()) + 1}",
        )
        for fence in _FENCE.finditer(text)
    ]
    # One that the pattern does not see would never be run.
    fences = re.findall(r"^[ >]*```", text, re.MULTILINE)
    assert len(fences) == 2 * len(found), f"{page.name} has a fence that is not understood"
    return found


def matches(expected: str, printed: str) -> bool:
    """Whether what was printed is what the page shows, where ``…`` is any text.

    How many blanks there are, and empty lines, is layout that follows the longest word.
    """
    pattern = ".*".join(re.escape(part) for part in _plain(expected).split("…"))
    return re.fullmatch(pattern, _plain(printed), re.DOTALL) is not None


def _plain(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


class _Elided(doctest.OutputChecker):
    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return want == got or (bool(want) and matches(want, got))


class Runner:
    """Runs the blocks of one page.

    Args:
        folder: where files are written and commands are run.
        environ: for the commands.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.environ = dict(environ)
        self.names: dict[str, Any] = {"__name__": "page"}

    def run(self, block: Block) -> None:
        """Run one block; fails the test where it does something else than the page says."""
        if block.file:
            self._write(block)
        elif block.word == "python":
            self._execute(block)
        elif block.word == "pycon":
            self._converse(block)
        elif block.word == "console":
            self._call(block)
        else:
            pytest.fail(f"{block.place}: nothing runs a block of '{block.word}'")

    def _write(self, block: Block) -> None:
        path = self.folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")

    def _execute(self, block: Block) -> None:
        flags = __future__.annotations.compiler_flag
        exec(compile(block.text, block.place, "exec", flags, dont_inherit=True), self.names)

    def _converse(self, block: Block) -> None:
        examples = doctest.DocTestParser().get_examples(block.text, block.place)
        assert examples, f"{block.place}: no '>>>'"
        session = doctest.DocTest(examples, {}, block.place, block.place, 0, block.text)
        session.globs = self.names
        said: list[str] = []
        runner = doctest.DocTestRunner(checker=_Elided(), verbose=False)
        runner.run(session, out=said.append, clear_globs=False)
        assert not runner.failures, f"{block.place}\n{''.join(said)}"

    def _call(self, block: Block) -> None:
        for command, expected in _commands(block):
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=self.folder,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=100,
                check=False,
            )
            where = f"{block.place}: $ {command}\n"
            if expected.strip():
                shown = f"{where}--- the page\n{expected}\n--- printed\n{done.stdout}"
                assert matches(expected, done.stdout), shown
            else:
                assert done.returncode == 0, f"{where}ended with {done.returncode}\n{done.stdout}"


def _commands(block: Block) -> Iterator[tuple[str, str]]:
    """Each command with the output that is shown below it."""
    first, *parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not first.strip(), f"{block.place}: a console block begins with '$'"
    for part in parts:
        command, _, expected = re.sub(r"\\\n", "", part).partition("\n")
        yield command, expected


def environment(**extra: str) -> dict[str, str]:
    """For commands of a page: those of the environment that runs the tests are found first."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TORCHWEFT_", "PYTEST_"))
    }
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    # Unbuffered, so that what goes to stdout and stderr comes in the order of the program.
    return {**kept, "PATH": path, "PYTHONUNBUFFERED": "1", **extra}
