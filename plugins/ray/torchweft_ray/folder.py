"""A copy of the working folder, for nodes that do not see the folder itself."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from torchweft.errors import InvalidRequest

__all__ = ["LIMIT", "packed", "unpack"]

#: Bytes that a folder may hold to be copied.
LIMIT = 512 << 20

#: What is made anew everywhere, or is of no use to a run.
_LEFT_OUT = (
    ".git",
    ".hg",
    ".ipynb_checkpoints",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".svn",
    ".tox",
    "__pycache__",
    "node_modules",
)


def packed(folder: Path, exclude: Sequence[str], limit: int = LIMIT) -> bytes:
    """The folder as an archive, without version control, caches and virtual environments.

    Args:
        folder: to copy.
        exclude: patterns of names, or of paths in the folder, to leave out.
        limit: bytes.

    Raises:
        InvalidRequest: where it holds more than ``limit`` bytes, naming what holds most.
    """
    found = list(_files(folder, exclude))
    sizes: Counter[str] = Counter()
    for path in found:
        sizes[path.relative_to(folder).parts[0]] += 0 if path.is_dir() else path.stat().st_size
    if sizes.total() > limit:
        largest = ", ".join(f"{name} ({_spell(size)})" for name, size in sizes.most_common(3))
        raise InvalidRequest(
            f"the folder {folder} holds {_spell(sizes.total())}, and launcher 'ray' copies at most "
            f"{_spell(limit)} to nodes that do not see it; most of it is in {largest}; start the "
            "script in a smaller folder or in one that all nodes share, or name what no rank needs "
            f"with launcher='ray:exclude={sizes.most_common(1)[0][0]}'"
        )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for path in found:
            # A link to a file becomes that file, which the node may not have.
            archive.dereference = not path.is_dir()
            archive.add(path, path.relative_to(folder).as_posix(), recursive=False)
    return buffer.getvalue()


def _files(folder: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """Folders before what is in them; links to folders as links, and no sockets or devices."""
    for base, folders, files in os.walk(folder):
        here = Path(base)
        folders[:] = sorted(
            name
            for name in folders
            if not _is_left_out(here / name, folder, exclude)
            and not (here / name / "pyvenv.cfg").is_file()
        )
        yield from (here / name for name in folders)
        for name in sorted(files):
            path = here / name
            if _is_left_out(path, folder, exclude) or not path.exists():
                continue
            if stat.S_ISREG(path.stat().st_mode):
                yield path


def _is_left_out(path: Path, folder: Path, exclude: Sequence[str]) -> bool:
    if path.name in _LEFT_OUT:
        return True
    within = path.relative_to(folder).as_posix()
    return any(fnmatch(path.name, each) or fnmatch(within, each) for each in exclude)


def unpack(archive: bytes, folder: Path) -> None:
    """Write an archive's files into a folder."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as found:
        # It is our own: links may point where they like.
        found.extraction_filter = lambda member, path: member
        found.extractall(folder)


def _spell(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB" if size >= 1 << 20 else f"{size:,} bytes"
