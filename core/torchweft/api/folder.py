"""A strategy's own way to write a model and its optimizer to a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

__all__ = ["FolderLayout", "Foreign"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A model and an optimizer in a folder of another program.

    They are loaded under the keys ``"model"`` and ``"optimizer"``.

    Attributes:
        processes: that wrote it.
        facts: for ``FolderLayout.check``; ``"strategy"`` is what to ask a Fabric for to read it.
        rest: plain values that are there too, by key.
    """

    processes: int
    facts: Mapping[str, Any]
    rest: Mapping[str, Any] = field(default_factory=dict)


class FolderLayout(ABC):
    """The files of a model and its optimizer, as an engine has them anyway.

    Without one, a folder holds tensors by name, which any strategy on any number of devices reads.
    A layout is for what is faster to write as it lies in memory; it may be read by nothing but the
    same strategy on as many devices, and a path with a suffix stays the form that all read. The
    folder around it, and everything else in the state, are the core's.

    Modules and optimizers are as ``Strategy.setup`` returned them. All processes call all methods,
    in the same order. One that fails must not leave the others waiting: what may fail in one
    process alone, such as to open a file, comes before the first collective, or its error is told
    to all, or raised behind the last.
    """

    #: By which a folder says what it is in.
    name: ClassVar[str]

    @abstractmethod
    def takes(self, module: nn.Module, optimizer: Optimizer) -> bool:
        """Whether this model and its optimizer are written this way; by tensors otherwise."""

    @abstractmethod
    def save(self, folder: str, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Write to an empty folder; files are on the disk when it returns.

        Returns what ``check`` has to know, as JSON has it; that of rank 0 is kept. Under
        ``"strategy"`` is what to ask a Fabric for to read it, if the name alone is not enough.
        """

    def find(self, path: str) -> Foreign | None:
        """What a folder holds that was written this way without torchweft; None: nothing such.

        Called by every process, of a folder that ``fabric.save`` did not write. Raises
        ``CheckpointError`` where another folder must have been meant, naming it.
        """
        return None

    @abstractmethod
    def check(
        self, facts: Mapping[str, Any], module: nn.Module, optimizer: Optimizer | None
    ) -> None:
        """Raise ``CheckpointError`` where ``load`` would fail, before anything is changed.

        ``facts`` is what ``save`` returned, or ``find`` found.
        """

    @abstractmethod
    def load(self, folder: str, module: nn.Module, optimizer: Optimizer | None) -> None:
        """Fill both, or the model alone, from what was written; runs no code that is in it."""
