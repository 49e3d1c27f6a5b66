"""The file that makes a folder a checkpoint: what is in it, written when all the rest is there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torchweft.errors import CheckpointError

__all__ = ["MANIFEST", "VALUES", "Entry", "Manifest", "check_no_part"]

#: Name of the file.
MANIFEST = "torchweft.json"

#: Name of the file with everything that is not a tensor of a model or an optimizer.
VALUES = "values.ckpt"

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor.

    Attributes:
        shape: of the whole.
        dtype: without ``torch.``.
        parts: ``{"file", "offset", "shape"}`` of each part that is stored.
    """

    shape: list[int]
    dtype: str
    parts: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder holds.

    Attributes:
        torchweft: version that wrote it.
        torch: version that wrote it.
        world_size: processes that wrote it.
        strategy: its name.
        precision: its name.
        entries: the tensors.
        files: size in bytes, by name.
        format: of the folder.
        layouts: by folder inside, what a strategy keeps there in a layout of its own: the name of
            that, and what it says of it.
    """

    torchweft: str
    torch: str
    world_size: int
    strategy: str
    precision: str
    entries: Mapping[str, Entry]
    files: Mapping[str, int]
    format: int = field(default=_FORMAT)
    layouts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def write(self, folder: str) -> None:
        """Into a folder, on the disk when it returns."""
        document = {"format": self.format, **asdict(self)}  # first, for whoever looks
        if not self.layouts:
            del document["layouts"]
        with open(os.path.join(folder, MANIFEST), "x", encoding="utf-8") as file:
            file.write(_lines(document))
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def names(folder: str) -> set[str]:
        """The files that a folder's manifest names, whether or not they are there."""
        files = _document(folder).get("files")
        return set(files) if isinstance(files, dict) else set()

    @classmethod
    def read(cls, folder: str) -> Manifest:
        """That of a folder which has one, all files being there.

        Raises ``CheckpointError`` for one that is damaged or of a later format, and for files that
        are missing or too short.
        """
        document = _document(folder)
        found = document.get("format")
        if isinstance(found, int) and found > _FORMAT:
            raise CheckpointError(
                f"'{folder}' is of format {found}, and this torchweft reads up to {_FORMAT}; it "
                "was written by a later version: pip install --upgrade torchweft"
            )
        try:
            document["entries"] = {k: Entry(**v) for k, v in document["entries"].items()}
            manifest = cls(**document)
            manifest._check_files(folder)
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"'{os.path.join(folder, MANIFEST)}' is not a manifest that torchweft wrote"
            ) from error
        return manifest

    def _check_files(self, folder: str) -> None:
        for name, size in self.files.items():
            if os.path.isabs(name) or os.path.normpath(name) != name or name.startswith(".."):
                raise CheckpointError(
                    f"the manifest of '{folder}' names the file {name!r}, which is elsewhere"
                )
            try:
                found = os.path.getsize(os.path.join(folder, name))
            except FileNotFoundError:
                raise CheckpointError(
                    f"'{folder}' is half a checkpoint: its file '{name}' of {size} bytes is "
                    "missing; copy the folder again as a whole, or load another one"
                ) from None
            if found < size:
                raise CheckpointError(
                    f"'{folder}' is half a checkpoint: its file '{name}' has {found} bytes of "
                    f"{size}; copy the folder again as a whole, or load another one"
                )


def check_no_part(path: str) -> None:
    """Raise ``CheckpointError`` for what is inside of a folder's checkpoint, naming that."""
    folder = os.path.dirname(path)
    while not os.path.exists(os.path.join(folder, MANIFEST)):
        if folder == os.path.dirname(folder):
            return
        folder = os.path.dirname(folder)
    # A file may be another one's, that somebody put there.
    parts = {MANIFEST, *Manifest.names(folder)}
    if os.path.isdir(path) or os.path.relpath(path, folder) in parts:
        raise CheckpointError(f"'{path}' is a part of a checkpoint; load the folder '{folder}'")


def _lines(document: Mapping[str, Any]) -> str:
    """JSON with a tensor, and a file, to a line."""
    rows = []
    for key, value in document.items():
        if isinstance(value, dict):
            inside = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            rows.append(f" {json.dumps(key)}: {{\n{inside}\n }}")
        else:
            rows.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _document(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            document: Any = json.load(file)
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"'{path}' is damaged: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"'{path}' is not a manifest that torchweft wrote")
    return document
