from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from tests.core.fresh_python import python

BUFFERED: dict[str, str | None] = {"PYTHONUNBUFFERED": None}


def test_a_fork_writes_nothing_twice(tmp_path: Path) -> None:
    code = """
    import ctypes, io, logging.handlers, os, sys
    from torchweft import process
    path = sys.argv[1]
    text = open(path + "/text", "w")
    binary = open(path + "/binary", "wb")
    layered = io.TextIOWrapper(io.BufferedWriter(io.FileIO(path + "/layered", "w")))
    for file in (text, layered):
        file.write("once")
    binary.write(b"once")
    log = logging.handlers.MemoryHandler(9, target=logging.FileHandler(path + "/log"))
    log.handle(logging.makeLogRecord({"msg": "once", "levelno": 1}))
    print("printed once")
    ctypes.CDLL(None).printf(b"by a library once\\n")
    process.flush_files()
    if os.fork():
        os.wait()
    """
    done = python(code, tmp_path, environ=BUFFERED)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["by a library once", "printed once"]
    assert {file.name: file.read_text().strip() for file in tmp_path.iterdir()} == {
        "text": "once",
        "binary": "once",
        "layered": "once",
        "log": "once",
    }


def test_what_files_hold_is_written_before_a_sudden_end(tmp_path: Path) -> None:
    code = """
    import ctypes, gzip, os, sys, tempfile
    from torchweft import process
    path = sys.argv[1]
    text = open(path + "/text", "w")
    text.write("whole")
    packed = gzip.open(path + "/packed", "wt")
    packed.write("whole")
    temporary = tempfile.NamedTemporaryFile(dir=path)
    print("whole")
    ctypes.CDLL(None).printf(b"of a library\\n")
    process.close_files()
    os._exit(0)
    """
    done = python(code, tmp_path, environ=BUFFERED)
    assert sorted(done.stdout.splitlines()) == ["of a library", "whole"], done.stderr
    assert (tmp_path / "text").read_text() == "whole"
    assert gzip.decompress((tmp_path / "packed").read_bytes()) == b"whole"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["packed", "text"]


@pytest.mark.parametrize("what", ["flush_files", "close_files"])
def test_files_that_cannot_be_written_stop_nobody(what: str, tmp_path: Path) -> None:
    code = """
    import io, os, sys
    from torchweft import process
    class Broken(io.RawIOBase):
        def close(self):
            raise OSError("broken")
    class Proxy:
        @property
        def __class__(self):
            raise RuntimeError("asked what it is")
    kept = [Broken(), Proxy(), open("/dev/full", "w"), open(sys.argv[2], "w")]
    for file in kept[2:]:
        file.write("whole")
    detached = open(sys.argv[2] + "2", "w")
    detached.detach()
    sys.stdout = sys.stderr = None
    getattr(process, sys.argv[1])()
    process.write_error("nowhere to go")
    os._exit(7)
    """
    path = tmp_path / "file"
    assert python(code, what, path).returncode == 7
    assert path.read_text() == "whole"
