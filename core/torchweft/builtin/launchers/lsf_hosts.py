"""The first of the nodes that a job of LSF computes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["first_host"]

#: Files with a host in every line, the most telling first.
_FILES = ("LSB_DJOB_RANKFILE", "LSB_DJOB_HOSTFILE")


def first_host(environ: Mapping[str, str], nodes: int) -> tuple[str, str]:
    """The host of rank 0 and the variable that names it; both empty where none does.

    Where the allocation has more hosts than the ``nodes`` that are used, the first is the one that
    the batch script runs on, and jsrun starts nothing there.
    """
    for name, hosts in _lists(environ):
        if hosts:
            return hosts[1 if len(hosts) > nodes else 0], name
    return "", ""


def _lists(environ: Mapping[str, str]) -> Iterable[tuple[str, list[str]]]:
    """Different hosts in their order, by the variable that names them."""
    for name in _FILES:
        yield name, list(dict.fromkeys(_lines(environ.get(name, ""))))
    # "host slots host slots"
    yield "LSB_MCPU_HOSTS", list(dict.fromkeys(environ.get("LSB_MCPU_HOSTS", "").split()[::2]))
    yield "LSB_HOSTS", list(dict.fromkeys(environ.get("LSB_HOSTS", "").split()))


def _lines(path: str) -> list[str]:
    try:
        words = [line.split() for line in Path(path).read_text().splitlines()] if path else []
    except (OSError, UnicodeDecodeError):  # it is on another node's drive
        return []
    return [line[0] for line in words if line]
