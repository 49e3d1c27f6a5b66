"""Saving and loading a run's models, optimizers and values, by every process of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torchweft.api import Run
from torchweft.checkpoint.agreeing import agreed
from torchweft.checkpoint.file import write
from torchweft.checkpoint.folder import is_folder_path, save_folder
from torchweft.checkpoint.opening import open_checkpoint
from torchweft.checkpoint.ranks import Ranks
from torchweft.checkpoint.restoring import Source, restore
from torchweft.checkpoint.state import collect
from torchweft.errors import CheckpointError

__all__ = ["load", "load_raw", "save"]


def save(
    run: Run,
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    filter: Mapping[str, Callable[[str, Any], bool]] | None = None,
) -> None:
    """Write ``state`` to ``path``; returns in every rank when it is there.

    Rank 0 writes one file, or, where the path has no suffix, every rank its part of a folder.
    Raises ``CheckpointError`` in every rank when it could not be written, what was there being as
    it was.
    """
    if is_folder_path(path):
        save_folder(run, path, state, filter)
    else:
        _save_file(run, path, state, filter)


def _save_file(
    run: Run,
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    filter: Mapping[str, Callable[[str, Any], bool]] | None,
) -> None:
    ranks = Ranks(run)
    content: list[Any] = []
    start = f"cannot save to '{os.path.abspath(path)}': "

    def gather() -> None:
        gathered = collect(
            state,
            strategy=run.strategy,
            precision=run.precision,
            is_writer=ranks.is_first,
            filter=filter,
        )
        content.append(gathered)

    def put() -> None:
        try:
            write(path, content.pop())
        except CheckpointError as error:
            raise CheckpointError(str(error).removeprefix(start)) from error.__cause__

    try:
        state, filter = agreed(ranks, state, filter)
        ranks.all(gather)
        ranks.first(put)
    except CheckpointError as error:
        raise CheckpointError(f"{start}{error}") from error.__cause__


def load(
    run: Run,
    path: str | os.PathLike[str],
    state: Any = None,
    strict: bool = True,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Fill ``state`` in place from ``path``, which every rank reads; returns what is left over.

    Everything, when ``state`` is None; otherwise tensors that are left over may still be in the
    file, from which they are read once they are used. Raises ``CheckpointError`` with the path, in
    every rank when it failed in one.
    """
    return _load(run, path, state, strict, weights_only)


def load_raw(
    run: Run,
    path: str | os.PathLike[str],
    obj: Any,
    strict: bool = True,
    weights_only: bool | None = None,
) -> None:
    """Fill one model or optimizer from a file that holds nothing but its state.

    Or from a folder, of those that torch.distributed.checkpoint writes.

    Raises ``CheckpointError`` with the path, in every rank when it failed in one.
    """
    _load(run, path, obj, strict, weights_only)


def _load(
    run: Run,
    path: str | os.PathLike[str],
    state: Any,
    strict: bool,
    weights_only: bool | None,
) -> dict[str, Any]:
    ranks = Ranks(run)
    opened: list[tuple[Any, Source]] = []
    left: list[dict[str, Any]] = []
    # Of what is not asked for, nothing need be in memory.
    mapped = state is not None and weights_only is not False

    def read() -> None:
        layout = run.strategy.folder_layout
        opened.append(open_checkpoint(path, weights_only is not False, mapped, layout))

    def fill() -> None:
        content, source = opened.pop()
        left.append(_restored(run, path, content, {} if state is None else state, strict, source))

    # Told to all, so that none goes on with what another could not load.
    ranks.all(read)
    ranks.all(fill)
    return left.pop()


def _restored(
    run: Run,
    path: str | os.PathLike[str],
    content: Any,
    state: Any,
    strict: bool,
    source: Source,
) -> dict[str, Any]:
    try:
        return restore(
            content,
            state,
            strategy=run.strategy,
            precision=run.precision,
            strict=strict,
            source=source,
        )
    except CheckpointError as error:
        raise CheckpointError(f"'{os.path.abspath(path)}': {error}") from error
