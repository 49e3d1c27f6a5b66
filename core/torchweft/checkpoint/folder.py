"""A checkpoint as a folder, to which every rank writes its part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchweft.api import Run
from torchweft.checkpoint.agreeing import agreed
from torchweft.checkpoint.file import sync_folder, write
from torchweft.checkpoint.layouts import Pair, find_pairs, write_pairs
from torchweft.checkpoint.manifest import VALUES, Entry, Manifest
from torchweft.checkpoint.parts import Parts, collect_parts
from torchweft.checkpoint.ranks import Ranks
from torchweft.checkpoint.replacing import Aside, check_target
from torchweft.checkpoint.shards import stored_parts, write_tensors
from torchweft.checkpoint.state import Filter
from torchweft.errors import CheckpointError

__all__ = ["is_folder_path", "save_folder"]


def is_folder_path(path: str | os.PathLike[str]) -> bool:
    """Whether a path without a suffix asks for a folder to be written."""
    # Where a name is nothing but a suffix, as in f"{name}.ckpt", a file was meant too.
    return "." not in os.path.basename(os.path.normpath(path))


def save_folder(
    run: Run,
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    filter: Mapping[str, Filter] | None = None,
) -> None:
    """Write ``state`` to a folder, each rank its part; returns in every rank when it is there.

    A reader, a crash or a full disk never meets half a checkpoint: all of it is written to a
    folder beside, flushed to the disk and put in place in one step.

    Raises ``CheckpointError`` in every rank when one could not write, what was there being as it
    was.
    """
    ranks = Ranks(run)
    try:
        state, filters = agreed(ranks, state, filter)
        pairs = find_pairs(run.strategy, state)
        parts = collect_parts(run, ranks, state, filters, pairs)
        target = ranks.first(lambda: check_target(path))
        _save(run, ranks, target, parts, pairs)
    except CheckpointError as error:
        shown = os.path.abspath(path)
        raise CheckpointError(f"cannot save to '{shown}': {error}") from error.__cause__


def _save(run: Run, ranks: Ranks, target: str, parts: Parts, pairs: Sequence[Pair]) -> None:
    opened: list[Aside] = []

    def begin() -> str:
        opened.append(Aside(target))
        return opened[0].path

    try:
        folder = ranks.first(begin)
        ranks.all(lambda: _check_shared(folder))
        metadata = write_tensors(ranks, folder, parts)
        layouts = write_pairs(ranks, folder, pairs)

        def end() -> None:
            _write_values(folder, parts, pairs)
            _describe(run, folder, metadata, layouts).write(folder)
            opened[0].put_in_place()

        ranks.first(end)
    finally:
        for aside in opened:
            aside.close()


def _check_shared(folder: str) -> None:
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"the folder '{os.path.dirname(folder)}' of rank 0 is not the one here; every process "
            "writes its part of a folder, so that it has to be on a file system that all nodes "
            "share. A path with a suffix, such as '.ckpt', is written by rank 0 alone"
        )


def _write_values(folder: str, parts: Parts, pairs: Sequence[Pair]) -> None:
    values: dict[str, Any] = {"content": parts.content, "places": list(parts.places.items())}
    if pairs:
        values["layouts"] = {pair.folder: pair.places for pair in pairs}
    try:
        write(os.path.join(folder, VALUES), values)
    except CheckpointError as error:
        # The place of a value that cannot be written, by the words of the user's state.
        words = str(error).partition("': ")[2].replace("state['content']", "state", 1)
        raise CheckpointError(words) from error.__cause__


def _describe(run: Run, folder: str, metadata: Any, layouts: Mapping[str, Any]) -> Manifest:
    from torchweft import __version__

    stored = stored_parts(metadata)
    entries = {
        entry: Entry(
            shape=list(described.size),
            dtype=str(described.properties.dtype).removeprefix("torch."),
            parts=[
                {"file": info.relative_path, "offset": list(offset), "shape": list(sizes)}
                for offset, sizes, info in stored[entry]
            ],
        )
        for entry, described in metadata.state_dict_metadata.items()
    }
    return Manifest(
        torchweft=__version__,
        torch=str(torch.__version__),
        world_size=run.rank.world_size,
        strategy=run.plan.strategy.name,
        precision=run.plan.precision.name,
        entries=entries,
        files=_files(folder),
        layouts=layouts,
    )


def _files(folder: str) -> dict[str, int]:
    """Sizes by name, of folders inside too, whose names are flushed to the disk."""
    sizes = {}
    for inside, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(inside, name)
            sizes[os.path.relpath(path, folder)] = os.path.getsize(path)
        if inside != folder:
            sync_folder(inside)
    return dict(sorted(sizes.items()))
