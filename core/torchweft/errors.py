"""Everything that torchweft raises on purpose.

A message names what was asked, what was found, who provides it and what to do about it.
"""

# The names say what is the matter; "Error" behind each would say it twice.
# ruff: noqa: N818

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "BrokenPlugin",
    "CheckpointError",
    "CollectiveTimeout",
    "IncompatiblePlan",
    "InvalidRequest",
    "Misuse",
    "NameClash",
    "NotAvailable",
    "RankFailed",
    "TorchweftError",
    "UnknownName",
    "UnknownOption",
    "did_you_mean",
    "listed",
]


class TorchweftError(Exception):
    """Base of every error that torchweft raises on purpose."""


class InvalidRequest(TorchweftError, ValueError):
    """A value that the user gave cannot mean anything, whatever is installed."""


class UnknownName(InvalidRequest):
    """No installed plugin declares a spec of that kind under that name."""


class UnknownOption(InvalidRequest):
    """An option that the chosen class does not take."""


class NameClash(TorchweftError):
    """Two plugins declare the same name for the same case; installation order must not decide."""


class NotAvailable(TorchweftError):
    """The name is known, but cannot be used here; the message says why and what to do."""


class BrokenPlugin(TorchweftError):
    """An installed plugin could not be loaded or declares something that cannot work."""


class IncompatiblePlan(TorchweftError):
    """Each choice exists, but not together."""


class Misuse(TorchweftError, RuntimeError):
    """A call at the wrong time or on the wrong object."""


class CheckpointError(TorchweftError):
    """A checkpoint could not be written, read or matched."""


class CollectiveTimeout(TorchweftError):
    """A collective operation took longer than was allowed; the message says who did not come."""


class RankFailed(TorchweftError):
    """A rank ended with an error. Carries the first failure; later ones only lost their peer.

    Attributes:
        rank: the global rank that failed first.
        exit_status: what a command that ran it should end with (``128 + n`` for signal ``n``).
    """

    def __init__(self, message: str, *, rank: int = 0, exit_status: int = 1) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_status = exit_status

    def __reduce__(self) -> tuple[object, ...]:
        return (_rank_failed, (self.args[0], self.rank, self.exit_status))


def _rank_failed(message: str, rank: int, exit_status: int) -> RankFailed:
    return RankFailed(message, rank=rank, exit_status=exit_status)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def listed(words: Sequence[str], shown: int = 8) -> str:
    """The first few of what there is, and how many more there are."""
    more = f" and {len(words) - shown} more" if len(words) > shown else ""
    return ", ".join(words[:shown]) + more
