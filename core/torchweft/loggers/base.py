"""What a logger is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

__all__ = ["Logger"]


class Logger(ABC):
    """Takes the numbers of a run.

    Fabric asks for ``log_metrics`` alone, so that a logger need not be of this class; deriving from
    it tells what else belongs to one. Fabric calls it on rank 0 only. A complete one::

        class PrintLogger(Logger):
            name = "print"
            version = 0

            def log_metrics(self, metrics, step=None):
                print(step, metrics)

            def log_hyperparams(self, params):
                print(params)

        fabric = Fabric(loggers=PrintLogger())
        fabric.log("loss", 0.3, step=1)

    A logger is constructed before the processes of a run exist: its constructor opens nothing, and
    it can be pickled.
    """

    @property
    @abstractmethod
    def name(self) -> str | None:
        """What the experiment is called; None where it has no name."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Which run of the experiment this is."""

    @property
    def root_dir(self) -> str | None:
        """The folder of all experiments; None where nothing is written to folders."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The folder of this run; None where nothing is written to folders."""
        return None

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers by name, which belong to ``step``; None: to the one after the last."""

    @abstractmethod
    def log_hyperparams(self, params: Any) -> None:
        """Record what the run was made with: a mapping, also nested, or an object's attributes."""

    # Not abstract: a logger that keeps nothing back has nothing to do in these two.

    def save(self) -> None:  # noqa: B027
        """Write what was recorded and is still kept back."""

    def finalize(self, status: str) -> None:
        """End the run; ``status``: ``"success"``, ``"failed"`` or ``"aborted"``."""
        self.save()
