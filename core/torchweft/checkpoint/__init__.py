"""Saving and loading a run's models, optimizers and values, by every process of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torchweft.api import Run
from torchweft.checkpoint.file import write
from torchweft.checkpoint.folder import is_folder_path, save_folder
from torchweft.checkpoint.opening import open_checkpoint
from torchweft.checkpoint.restoring import restore
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
    is_writer = run.rank.rank == 0
    content = collect(
        state,
        strategy=run.strategy,
        precision=run.precision,
        is_writer=is_writer,
        filter=filter,
    )
    failure: CheckpointError | None = None
    if is_writer:
        try:
            write(path, content)
        except CheckpointError as error:
            failure = error
    # Told to all, so that none waits for a rank that went to handle the error.
    message = run.collectives.broadcast(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if message is not None:
        raise CheckpointError(f"rank 0: {message}")


def load(
    run: Run,
    path: str | os.PathLike[str],
    state: Any = None,
    strict: bool = True,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Fill ``state`` in place from ``path``, which every rank reads; returns what is left over.

    Everything, when ``state`` is None. Raises ``CheckpointError`` with the path.
    """
    return _load(run, path, {} if state is None else state, strict, weights_only)


def load_raw(
    run: Run,
    path: str | os.PathLike[str],
    obj: Any,
    strict: bool = True,
    weights_only: bool | None = None,
) -> None:
    """Fill one model or optimizer from a file that holds nothing but its state.

    Or from a folder, of those that torch.distributed.checkpoint writes.

    Raises ``CheckpointError`` with the path.
    """
    _load(run, path, obj, strict, weights_only)


def _load(
    run: Run,
    path: str | os.PathLike[str],
    state: Any,
    strict: bool,
    weights_only: bool | None,
) -> dict[str, Any]:
    content, source = open_checkpoint(path, weights_only is not False)
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
