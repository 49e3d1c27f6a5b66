"""A checkpoint at a path, whichever of the two forms it has."""

from __future__ import annotations

import os
from typing import Any

from torchweft.api import FolderLayout
from torchweft.checkpoint.file import read
from torchweft.checkpoint.manifest import check_no_part
from torchweft.checkpoint.mapping import MappedFile
from torchweft.checkpoint.reading import Folder
from torchweft.checkpoint.replacing import put_aside
from torchweft.checkpoint.restoring import Source
from torchweft.errors import CheckpointError

__all__ = ["open_checkpoint"]


def open_checkpoint(
    path: str | os.PathLike[str],
    weights_only: bool = True,
    mapped: bool = False,
    layout: FolderLayout | None = None,
) -> tuple[Any, Source]:
    """What a file or a folder holds, and who has its tensors.

    ``layout``: that of the run's strategy, which may know a folder that nobody else does.
    ``mapped``: those of a file stay in it, where its form allows it.

    Raises ``CheckpointError`` where none is, naming what is there instead.
    """
    shown = os.path.abspath(path)
    if os.path.isdir(shown):
        folder = Folder(shown, weights_only, layout)
        return folder.content, folder
    check_no_part(shown)
    aside = put_aside(shown)
    if aside:
        raise CheckpointError(
            f"there is no checkpoint '{shown}', since a save that was to replace it was killed; "
            f"the one before is whole: rename '{aside}' to '{shown}'"
        )
    content = read(path, weights_only=weights_only, mapped=mapped)
    return content, MappedFile() if mapped else Source()
