"""Steps that the ranks of a run take together, the failure of any of which all of them learn."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from torchweft.api import Run
from torchweft.checkpoint.file import reason
from torchweft.errors import CheckpointError, InvalidRequest

__all__ = ["Ranks"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What is told of an error, which itself may be one that others cannot make."""

    words: str
    is_request: bool

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        ours = isinstance(error, CheckpointError | InvalidRequest)
        return cls(str(error) if ours else reason(error), isinstance(error, InvalidRequest))


class Ranks:
    """The ranks of a run, none of which waits for one that went to handle an error.

    Both methods must be called by all of them, in the same order. In the rank that failed, what
    they raise has the error as its ``__cause__``, or is the error where there is one rank alone.
    """

    def __init__(self, run: Run) -> None:
        self._collectives = run.collectives
        self.rank = run.rank.rank
        self.size = run.rank.world_size
        self._told: Exception | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all(self, function: Callable[[], T]) -> list[T]:
        """What ``function`` returned in each rank.

        Raises ``CheckpointError`` in every rank when it raised in one, or ``InvalidRequest`` when
        that was what it raised.
        """
        failure, mine, cause = self._attempt(function)
        told = [(failure, mine)]
        if self.size > 1:
            try:
                packed = pickle.dumps((failure, mine))
            except Exception as error:
                packed, cause = pickle.dumps((_Failure.of(error), None)), error
            told = [pickle.loads(each) for each in self._gather(packed)]
        for rank, (failed, _) in enumerate(told):
            self._check(failed, rank, cause)
        answers: Any = [value for _, value in told]
        return list(answers)

    def first(self, function: Callable[[], T]) -> T:
        """What ``function``, called in rank 0 alone, returned.

        Raises in every rank when it raised, as ``all`` does.
        """
        failed, value, cause = None, None, None
        if self.is_first:
            failed, value, cause = self._attempt(function)
        failed, value = self._collectives.broadcast((failed, value))
        self._check(failed, 0, cause)
        answer: Any = value
        return answer  # type: ignore[no-any-return]

    def _attempt(
        self, function: Callable[[], T]
    ) -> tuple[_Failure | None, T | None, Exception | None]:
        try:
            return None, function(), None
        except Exception as error:
            if error is self._told:  # and so by every rank
                raise
            return _Failure.of(error), None, error

    def _check(self, failed: _Failure | None, rank: int, cause: Exception | None) -> None:
        if failed is None:
            return
        if self.size == 1 and isinstance(cause, CheckpointError | InvalidRequest):
            self._told = cause
            raise cause
        words = failed.words if self.size == 1 else f"rank {rank}: {failed.words}"
        self._told = InvalidRequest(words) if failed.is_request else CheckpointError(words)
        raise self._told from (cause if rank == self.rank else None)

    def _gather(self, content: bytes) -> list[bytes]:
        """Everybody's bytes: padded to the longest, since a collective wants one shape."""
        size = torch.tensor([len(content)])
        sizes = [int(each) for each in self._collectives.all_gather(size)]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        gathered = self._collectives.all_gather(padded)
        return [row[:n].numpy().tobytes() for row, n in zip(gathered, sizes, strict=True)]
