"""A compilation that was ended holds up nobody; one that goes on is waited for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils import file_baton

from tests.deepspeed.locks import remove_left

#: As torch does it where it compiles an extension, without importing all of it.
HOLD = (
    f"import runpy, sys; made = runpy.run_path({file_baton.__file__!r})['FileBaton']; "
    "print(made(sys.argv[1]).try_acquire(), flush=True); sys.stdin.read()"
)


@contextmanager
def holding(lock: Path) -> Iterator[subprocess.Popen[str]]:
    lock.parent.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_lock_goes_with_who_held_it(tmp_path: Path) -> None:
    ended, held = tmp_path / "ended" / "lock", tmp_path / "held" / "lock"
    with holding(ended), holding(held):
        assert remove_left(tmp_path) == []
    with holding(tmp_path / "third" / "lock") as third:
        assert sorted(remove_left(tmp_path)) == [ended.resolve(), held.resolve()]
        assert third.poll() is None
        assert [path.parent.name for path in tmp_path.glob("*/lock")] == ["third"]
