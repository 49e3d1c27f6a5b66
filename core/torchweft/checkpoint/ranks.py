"""Steps that the ranks of a run take together, the failure of any of which all of them learn."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from torchweft.api import Run
from torchweft.checkpoint.file import reason
from torchweft.errors import CheckpointError

__all__ = ["Ranks"]

T = TypeVar("T")


class _ToldError(CheckpointError):
    """A failure that every rank has learned of already."""


class Ranks:
    """The ranks of a run, none of which waits for one that went to handle an error.

    Both methods must be called by all of them, in the same order.
    """

    def __init__(self, run: Run) -> None:
        self._collectives = run.collectives
        self.rank = run.rank.rank
        self.size = run.rank.world_size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all(self, function: Callable[[], T]) -> list[T]:
        """What ``function`` returned in each rank.

        Raises ``CheckpointError`` in every rank when it raised in one.
        """
        failure, mine = self._attempt(function)
        if self.size == 1:
            told = [(failure, mine)]
        else:
            told = [pickle.loads(each) for each in self._gather(pickle.dumps((failure, mine)))]
        for rank, (failed, _) in enumerate(told):
            self._check(failed, rank)
        answers: Any = [value for _, value in told]
        return list(answers)

    def first(self, function: Callable[[], T]) -> T:
        """What ``function``, called in rank 0 alone, returned.

        Raises ``CheckpointError`` in every rank when it raised.
        """
        told: Any = self._attempt(function) if self.is_first else None
        failed, value = self._collectives.broadcast(told)
        self._check(failed, 0)
        answer: T = value
        return answer

    def _attempt(self, function: Callable[[], T]) -> tuple[str | None, T | None]:
        try:
            return None, function()
        except _ToldError:
            raise
        except CheckpointError as error:
            return str(error), None
        except Exception as error:
            return reason(error), None

    def _check(self, failed: str | None, rank: int) -> None:
        if failed is not None:
            raise _ToldError(failed if self.size == 1 else f"rank {rank}: {failed}")

    def _gather(self, content: bytes) -> list[bytes]:
        """Everybody's bytes: padded to the longest, since a collective wants one shape."""
        size = torch.tensor([len(content)])
        sizes = [int(each) for each in self._collectives.all_gather(size)]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        gathered = self._collectives.all_gather(padded)
        return [row[:n].numpy().tobytes() for row, n in zip(gathered, sizes, strict=True)]
