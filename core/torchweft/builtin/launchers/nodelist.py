"""The names of nodes that SLURM writes short: ``a[01-03,7],b`` is a01, a02, a03, a7 and b."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torchweft.errors import InvalidRequest

__all__ = ["hosts"]

#: A name, where a comma between brackets ends nothing.
_NAME = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
#: The names of a list; nothing between two commas counts for nothing.
_LIST = re.compile(rf"[\s,]*(?:{_NAME.pattern}\s*(?:,[\s,]*|$))*")
_PIECE = re.compile(r"\[([^\]]*)\]|[^\[]+")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")

#: What may stand at one place of a name: texts, or numbers and their least width.
_Alternatives = Sequence[tuple[range, int]] | str


def hosts(text: str) -> Iterator[str]:
    """Every name of the list in turn, as ``scontrol show hostnames`` prints them.

    Numbers have the width of the first one of their range. A name that is listed twice comes
    twice. Raises ``InvalidRequest`` where the text is no such list.
    """
    if not _LIST.fullmatch(text):
        raise _unreadable(text)
    for name in _NAME.findall(text):
        yield from _spelled([_alternatives(match, text) for match in _PIECE.finditer(name)])


def _alternatives(piece: re.Match[str], text: str) -> _Alternatives:
    if piece.group(1) is None:
        return piece.group()
    found = []
    for part in piece.group(1).split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _unreadable(text)
        first, last = match.group(1), match.group(2) or match.group(1)
        if int(last) < int(first):
            raise _unreadable(text)
        found.append((range(int(first), int(last) + 1), len(first)))
    return found


def _spelled(pieces: Sequence[_Alternatives]) -> Iterator[str]:
    """Every way to write a name, the last number changing first."""
    if not pieces:
        yield ""
        return
    *before, last = pieces
    for beginning in _spelled(before):
        if isinstance(last, str):
            yield beginning + last
            continue
        for numbers, width in last:
            for number in numbers:
                yield f"{beginning}{number:0{width}}"


def _unreadable(text: str) -> InvalidRequest:
    return InvalidRequest(
        f"the list of nodes '{text}' cannot be read; SLURM writes names with ranges in brackets, "
        "such as a[01-03,7],b"
    )
