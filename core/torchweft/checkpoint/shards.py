"""Tensors in the files of a folder: each rank writes its parts, and reads what it needs.

The files are those of torch.distributed.checkpoint, whose planner and file format are used. Its
``save`` and ``load`` are not: they speak over torch's own process group, warn in a single process,
and unpickle what they find.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchweft.checkpoint.file import first_line
from torchweft.checkpoint.parts import Parts
from torchweft.checkpoint.ranks import Ranks
from torchweft.errors import CheckpointError

__all__ = ["is_tensor", "read_tensors", "stored_parts", "write_tensors"]


def write_tensors(ranks: Ranks, folder: str, parts: Parts) -> Any:
    """Write what each rank has, a tensor that several have once; in rank 0 the ``Metadata``.

    Files are on the disk when it returns. Raises ``CheckpointError`` in every rank when one
    failed.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = FileSystemWriter(folder, sync_files=True)

    def plan() -> Any:
        planner.set_up_planner(parts.tensors, writer.storage_meta(), ranks.is_first)
        writer.set_up_storage_writer(ranks.is_first)
        return writer.prepare_local_plan(planner.create_local_plan())

    local = ranks.all(plan)

    def decide() -> tuple[Any, Any]:
        chosen, metadata = planner.create_global_plan(local)
        return writer.prepare_global_plan(chosen), metadata

    chosen, metadata = ranks.first(decide)

    def write() -> Any:
        mine = planner.finish_plan(chosen[ranks.rank])
        if not mine.items:
            return []  # and no file is left
        with warnings.catch_warnings():
            # What older versions of torch say of their own code.
            warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
            return writer.write_data(mine, planner).wait()

    results = ranks.all(write)
    ranks.first(lambda: _finish(writer, metadata, results, parts))
    return metadata


def _finish(writer: Any, metadata: Any, results: list[Any], parts: Parts) -> None:
    """Write the ``Metadata``, in which a tied tensor has both of its names."""
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.storage import WriteResult

    for name, entry in parts.ties.items():
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata[entry]
        results.append(
            [
                WriteResult(
                    index=MetadataIndex(name, each.index.offset, each.index.index),
                    size_in_bytes=each.size_in_bytes,
                    storage_data=each.storage_data,
                )
                for of_rank in results
                for each in of_rank
                if each.index.fqn == entry
            ]
        )
    # By this, torch's own tools make nested dicts of it again.
    metadata.planner_data = {
        entry: tuple(key if isinstance(key, int) else str(key) for key in place)
        for entry, place in parts.places.items()
    }
    writer.finish(metadata, results)
    # Older versions of torch tell where tensors are stored to a copy of it alone.
    metadata.storage_data = {each.index: each.storage_data for told in results for each in told}


def is_tensor(described: Any) -> bool:
    """Whether an entry of the ``Metadata`` is a tensor, and not pickled."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return isinstance(described, TensorStorageMetadata)


def stored_parts(metadata: Any) -> dict[str, list[Any]]:
    """By entry, ``(offset, sizes, storage)`` of the parts that it is stored in."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    return {
        entry: [
            (chunk.offsets, chunk.sizes, metadata.storage_data[MetadataIndex(entry, chunk.offsets)])
            for chunk in stored.chunks
        ]
        for entry, stored in metadata.state_dict_metadata.items()
        if is_tensor(stored)
    }


def read_tensors(folder: str, metadata: Any, targets: Mapping[str, Tensor]) -> None:
    """Fill each target, by entry: whole, or as it is split; its dtype is kept.

    Ranks read for themselves. Raises ``CheckpointError`` with the folder.
    """
    if not targets:
        return
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for entry in targets:
        # torch unpickles everything else, and so runs code that is in it.
        if not is_tensor(metadata.state_dict_metadata.get(entry)):
            raise CheckpointError(
                f"the description in '{folder}' does not say that '{entry}' is a tensor, which it "
                "has to be; the folder is damaged, or was changed"
            )
    planner = _planner()
    reader = FileSystemReader(folder)
    try:
        with torch.no_grad():
            reader.set_up_storage_reader(metadata, is_coordinator=True)
            planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            reader.read_data(plan, planner).wait()
    except (CheckpointError, MemoryError):
        raise
    except OSError as error:
        name = os.path.basename(str(error.filename or ""))
        raise CheckpointError(
            f"cannot read '{os.path.join(folder, name)}': {error.strerror or error}"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"the tensors in '{folder}' cannot be read: {first_line(error)}; a file may be damaged"
        ) from error


def _planner() -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    class TensorsAlone(DefaultLoadPlanner):
        """torch's own unpickles what is no tensor."""

        def load_bytes(self, read_item: Any, value: Any) -> None:
            raise CheckpointError(f"'{read_item.dest_index.fqn}' is not stored as a tensor")

    return TensorsAlone(flatten_state_dict=False, flatten_sharded_tensors=False)
