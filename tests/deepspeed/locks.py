"""Removes locks of compilations that were ended: torch has everybody wait for them, for ever."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory


def remove_left(folder: Path) -> list[Path]:
    """Those of the extensions in a folder which no process has open, as who compiles does."""
    locks = [lock.resolve() for lock in folder.glob("*/lock")]
    # Elsewhere than on Linux nobody can be asked, and a lock stays.
    if not locks or not Path("/proc/self/fd").exists():
        return []
    held = _open_files()
    left = [lock for lock in locks if str(lock) not in held]
    for lock in left:
        lock.unlink(missing_ok=True)
    return left


def _open_files() -> set[str]:
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        # Processes end meanwhile, and other users' are closed to this one.
        with suppress(OSError):
            found.add(os.readlink(link))
    return found


if __name__ == "__main__":
    for lock in remove_left(Path(_get_build_directory("cpu_adam", False)).parent):
        print(f"removed {lock}, left by a compilation that was ended", file=sys.stderr)
