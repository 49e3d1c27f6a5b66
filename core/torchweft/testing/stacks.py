"""Where a rank stands: what ``faulthandler`` wrote of it, and a line about it."""

from __future__ import annotations

import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

import torchweft

__all__ = ["Frame", "main_frames", "standing"]

_LINE = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?+) in (?P<function>.*)$')

_TORCHWEFT = str(Path(torchweft.__file__).parent)
#: Code that waits on behalf of others: the line that matters is the one that called it.
_MACHINERY = (str(Path(torch.__file__).parent), _TORCHWEFT, sysconfig.get_path("stdlib"), "<")
#: The kit's own training loops stand for an author's.
_LOOPS = tuple(f"{_TORCHWEFT}/testing/{name}" for name in ("training", "failing", "strategy"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A line of a stack."""

    file: str
    line: str
    function: str

    @property
    def machinery(self) -> bool:
        """Whether somebody else's code called it to have something done."""
        packages = f"{sysconfig.get_path('purelib')}/"
        if self.file.startswith(_LOOPS):
            return False
        own = (*_MACHINERY[:2], _MACHINERY[3])
        return self.file.startswith(own) or (
            self.file.startswith(_MACHINERY[2]) and not self.file.startswith(packages)
        )


def main_frames(text: str, main: int) -> list[Frame]:
    """The stack of thread ``main`` in what ``faulthandler`` wrote, innermost call first."""
    frames: list[Frame] = []
    inside = False
    for line in text.splitlines():
        head = re.match(r"(?:Current thread|Thread) 0x([0-9a-f]+)", line)
        if head:
            inside = int(head[1], 16) == main
            continue
        found = _LINE.match(line)
        if inside and found:
            frames.append(Frame(**found.groupdict()))
    return frames


def standing(frames: list[Frame]) -> str:
    """``"train.py, line 12 in train, in barrier()"``, of a stack with its innermost call first."""
    if not frames:
        return "nothing is known of it"
    own = next((i for i, frame in enumerate(frames) if not frame.machinery), None)
    if own is None:
        return f"in {frames[0].function}() of {Path(frames[0].file).name}, before any code of yours"
    frame = frames[own]
    place = f"{Path(frame.file).name}, line {frame.line} in {frame.function}"
    return f"{place}, in {frames[own - 1].function}()" if own else place
