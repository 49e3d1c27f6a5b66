"""What makes a loop slow on XLA: transfers and compilations in its steps, by the line of a script.

Counting them costs two lookups for each graph. Where their number says that a loop does it
again and again, a few steps are watched operation by operation to find the line, and one warning
names it.
"""

from __future__ import annotations

import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch_xla.debug.metrics as metrics
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchweft

__all__ = ["Shapes", "Watch"]

#: Graphs at the beginning of which nothing is concluded: parameters, optimizer states, first reads.
FIRST = 4

#: As many graphs in a row with a transfer, or a compilation, are a habit.
HABIT = 3

#: Graphs that are watched, at most: what was not found in them will not be.
WATCHED = 6


class Watch:
    """Told of the end of every graph."""

    def __init__(self) -> None:
        self._graphs = 0
        self._before = _counts()
        self._in_a_row = [0, 0]
        self._told = [False, False]
        self._recorder: _Recorder | None = None
        self._last: list[tuple[Any, str]] | None = None
        self._left = WATCHED

    def ended(self) -> None:
        """A graph ended; warns where the loop has a habit, once for each."""
        if self._recorder is not None:
            self._look(self._recorder)
        now = _counts()
        self._graphs += 1
        for i in (0, 1):
            grew = now[i] > self._before[i] and self._graphs > FIRST
            self._in_a_row[i] = self._in_a_row[i] + 1 if grew else 0
        self._before = now
        habit = [
            n >= HABIT and not told for n, told in zip(self._in_a_row, self._told, strict=True)
        ]
        if any(habit) and self._left:
            # Each operation costs more meanwhile.
            self._left -= 1
            self._recorder = _Recorder()
            self._recorder.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Watch no further."""
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._recorder = None

    def _look(self, recorder: _Recorder) -> None:
        self.close()
        if not self._told[0] and recorder.transfers:
            self._told[0] = True
            lines = ", ".join(dict.fromkeys(recorder.transfers))
            warnings.warn(
                f"every step waits for the XLA device at {lines}: a value is read there, for which "
                "the graph is cut in two and the device left idle; keep tensors "
                "(loss.detach()), and read them now and then",
                UserWarning,
                stacklevel=4,
            )
        if not self._told[1] and self._last is not None:
            line = _first_difference(self._last, recorder.operations)
            if line:
                self._told[1] = True
                warnings.warn(
                    f"every step compiles a graph anew for XLA, because of what changes at {line}; "
                    "give tensors the same shape in every step (fill them up), and pass a number "
                    "that changes as a tensor",
                    UserWarning,
                    stacklevel=4,
                )
        self._last = recorder.operations


def _counts() -> tuple[int, int]:
    """Transfers to the host, and compilations, in this process."""
    transfers = metrics.metric_data("TransferFromDeviceTime")
    return transfers[0] if transfers else 0, metrics.counter_value("UncachedCompile") or 0


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation of a step, and the line of the script from which it came."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, str]] = []
        self.transfers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        from_device, to_device = any(map(_on_device, leaves)), _on_device(result)
        if from_device or to_device:
            line = _line()
            self.operations.append(((str(func), *map(_constant, leaves)), line))
            # A number, or a tensor of the host: it is waited for.
            number = func is torch.ops.aten._local_scalar_dense.default
            if from_device and (number or (isinstance(result, Tensor) and not to_device)):
                self.transfers.append(line)
        return result


def _on_device(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "xla"


def _constant(leaf: Any) -> Any:
    """What of an argument is a part of the graph: shapes and whole numbers, no others."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape)
    return type(leaf).__name__ if isinstance(leaf, float) else repr(leaf)


def _first_difference(one: list[tuple[Any, str]], other: list[tuple[Any, str]]) -> str:
    for (operation, _), (again, line) in zip(one, other, strict=False):
        if operation != again:
            return line
    return ""


_LIBRARIES = tuple(
    {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        sysconfig.get_path("stdlib"),
        *(str(Path(file).parent) for file in (torchweft.__file__, __file__)),
    }
)


def _line() -> str:
    """``file:line`` of the innermost frame that is no library's."""
    for frame in _frames():
        name = frame.f_code.co_filename
        if not name.startswith((*_LIBRARIES, "<")):
            return f"{name}:{frame.f_lineno}"
    return "a backward pass"


def _frames() -> Iterator[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


class Shapes:
    """Whether batches come in ever new shapes, each of which is compiled for."""

    #: Full and last batches of training and evaluation, and one more.
    ENOUGH = 5

    def __init__(self) -> None:
        self._seen: dict[tuple[torch.Size, ...], None] = {}
        self._told = False

    def note(self, shapes: tuple[torch.Size, ...]) -> None:
        """The shapes of a batch's tensors; warns once."""
        if self._told or shapes in self._seen:
            return
        self._seen[shapes] = None
        if len(self._seen) > self.ENOUGH:
            self._told = True
            found = "; ".join(", ".join(str(tuple(s)) for s in seen) for seen in self._seen)
            warnings.warn(
                f"the last {len(self._seen)} different batches have as many shapes ({found}), and "
                "XLA compiles a graph for each, which takes seconds to minutes; have the loader's "
                "collate_fn fill tensors up to a few sizes",
                UserWarning,
                stacklevel=4,
            )
