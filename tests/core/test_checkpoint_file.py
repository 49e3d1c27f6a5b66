"""torchweft.checkpoint.file: a checkpoint is there whole or not at all, and runs no code."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import json
import os
import pathlib
import random
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from torchweft.checkpoint.file import read, stem_of, write
from torchweft.errors import CheckpointError

CONTENT = {"model": {"w": torch.arange(300.0).reshape(3, 100)}, "step": 7, "name": "a"}


def temporaries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# -- what is written is read ---------------------------------------------------------------------

plain_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**100), 2**100),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(max_size=8),
    st.binary(min_size=1, max_size=8),
    st.binary(max_size=8).map(bytearray),
    st.sampled_from([torch.float16, torch.device("cpu"), torch.Size([2, 3])]),
    st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
    ),
)
nested = st.recursive(
    plain_values,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(nested)
def test_nested_values_come_back_the_same(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.ckpt")
        write(path, content)
        assert same(read(path), content)
        assert same(torch.load(path, weights_only=True), content)
        assert os.listdir(folder) == ["x.ckpt"]


def test_it_is_an_ordinary_file_in_a_folder_that_is_made(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "runs" / "1" / "last.ckpt", CONTENT)
    finally:
        os.umask(before)
    path = tmp_path / "runs" / "1" / "last.ckpt"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert same(torch.load(path, weights_only=True), CONTENT)


def test_the_file_that_was_there_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write(path, {"step": 1})
    opened = path.open("rb")
    write(path, {"step": 2})
    # Who had opened the old one still reads it whole.
    with opened:
        assert torch.load(opened, weights_only=True) == {"step": 1}
    assert read(path) == {"step": 2}


def test_a_relative_path_and_a_name_of_the_greatest_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.ckpt", "ü" * 127, "x" * 255):
        write(name, CONTENT)
        assert same(read(name), CONTENT)


def test_a_link_is_followed_as_any_write_does(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "store" / "real.ckpt")
    write(tmp_path / "last.ckpt", CONTENT)
    assert (tmp_path / "last.ckpt").is_symlink()
    assert os.listdir(tmp_path / "store") == ["real.ckpt"]
    assert same(read(tmp_path / "last.ckpt"), CONTENT)


def test_shared_tensors_stay_shared_and_are_written_once(tmp_path: Path) -> None:
    tensor = torch.zeros(100_000)
    write(tmp_path / "x.ckpt", {"a": tensor, "b": tensor.view(10, 10_000)})
    assert (tmp_path / "x.ckpt").stat().st_size < 500_000
    loaded = read(tmp_path / "x.ckpt")
    loaded["a"][0] = 1
    assert loaded["b"][0, 0] == 1


def test_a_modules_state_keeps_the_versions_beside_it(tmp_path: Path) -> None:
    state = nn.BatchNorm1d(2).state_dict()
    write(tmp_path / "x.ckpt", {"model": state, "best": np.float32(1)})
    assert read(tmp_path / "x.ckpt")["model"]._metadata == state._metadata  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "legacy", [pytest.param(False, id="zip"), pytest.param(True, id="before-1.6")]
)
def test_files_of_plain_torch_are_read(tmp_path: Path, legacy: bool) -> None:
    torch.save(CONTENT, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    assert same(read(tmp_path / "x.pt"), CONTENT)


def test_numpy_numbers_become_pythons(tmp_path: Path) -> None:
    content = {
        "loss": np.float32(0.5),
        "best": [np.float64(0.1), (np.int64(-3), np.bool_(True)), np.complex128(1j)],
        np.int64(5): np.str_("five"),
        "ordered": collections.OrderedDict(a=np.uint8(200)),
    }
    write(tmp_path / "x.ckpt", content)
    expected = {
        "loss": 0.5,
        "best": [0.1, (-3, True), 1j],
        5: "five",
        "ordered": collections.OrderedDict(a=200),
    }
    assert same(read(tmp_path / "x.ckpt"), expected)
    assert type(content["loss"]) is np.float32  # what the user holds is not changed


def test_a_container_may_hold_itself(tmp_path: Path) -> None:
    cyclic: list[Any] = [1]
    cyclic.append(cyclic)
    write(tmp_path / "x.ckpt", {"cyclic": cyclic})
    loaded = read(tmp_path / "x.ckpt")["cyclic"]
    assert loaded[1] is loaded


# -- what cannot be read back is refused ---------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    lr: float = 0.1


Pair = collections.namedtuple("Pair", "a b")

REFUSED = [
    (
        {"config": argparse.Namespace(lr=1)},
        (
            "state['config'] is of type argparse.Namespace, and a file that loads without running "
            "code cannot hold it; save vars(value) in its place, or give its class state_dict() "
            "and load_state_dict(), or call torch.serialization.add_safe_globals([Namespace]) "
            "before saving and loading, if loading it is harmless"
        ),
    ),
    (
        {"rng": [0, np.zeros(3)]},
        (
            "state['rng'][1] is of type numpy.ndarray, and a file that loads without running code "
            "cannot hold it; save torch.from_numpy(value) in its place"
        ),
    ),
    ({"a": {"b": (1, Config())}}, "state['a']['b'][1] is of type"),
    ({"a": {"b": (1, Config())}}, "save dataclasses.asdict(value) in its place, or"),
    ({"colour": Colour.RED}, "save value.value in its place"),
    ({Colour.RED: 1}, "the key <Colour.RED: 1> of state is of type"),
    ({"pair": Pair(1, 2)}, "save value._asdict() in its place"),
    ({"path": pathlib.Path("x")}, "save str(value) in its place"),
    ({"ids": frozenset({1})}, "state['ids'] is of type frozenset, and"),
    ({"ids": {frozenset({1})}}, "an element of state['ids'] is of type frozenset, and"),
    ({"counts": collections.defaultdict(int)}, "save dict(value) in its place"),
    ({"queue": collections.deque([1])}, "save list(value) in its place"),
    ({"kind": int}, "state['kind'] is of type type, and"),
    ({"fn": torch.relu}, "save its name in its place"),
    ({"many": [0, 2**4000]}, "state['many'][1] is of type int, and"),
    ({"many": [b"x", b""]}, "save bytearray(value) in its place"),
    ({"model": nn.Linear(1, 1)}, "save value.state_dict() in its place"),
    ({"fn": lambda: 0}, "state['fn'] is of type function, and it cannot be pickled (Can't pickle"),
    ({"lock": threading.Lock()}, "state['lock'] is of type _thread.lock, and it cannot be pickled"),
    ({"lazy": nn.LazyLinear(1).weight}, "state['lazy'] is of type torch.nn.parameter.Uninit"),
]


@pytest.mark.parametrize(("content", "words"), REFUSED)
def test_a_value_that_could_not_be_read_back_is_named(
    tmp_path: Path, content: Any, words: str
) -> None:
    path = tmp_path / "x.ckpt"
    write(path, CONTENT)
    with pytest.raises(CheckpointError) as caught:
        write(path, content)
    assert str(caught.value).startswith(f"cannot save to '{path}': ")
    assert words in str(caught.value)
    assert same(read(path), CONTENT)
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_a_class_that_the_user_called_safe_is_written(tmp_path: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        write(tmp_path / "x.ckpt", {"config": argparse.Namespace(lr=1)})
        assert read(tmp_path / "x.ckpt")["config"].lr == 1


def test_nesting_beyond_pythons_limit_is_an_error(tmp_path: Path) -> None:
    content: Any = 1
    for _ in range(5000):
        content = [content]
    with pytest.raises(CheckpointError, match="recursion"):
        write(tmp_path / "x.ckpt", content)
    assert os.listdir(tmp_path) == []


# -- where it cannot be written ------------------------------------------------------------------


def test_paths_that_are_no_place_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path / "file" / "x.ckpt": f"'{tmp_path}/file' is not a folder",
        tmp_path / "file" / "deep" / "x.ckpt": f"'{tmp_path}/file' is not a folder",
        tmp_path / "folder": "it is a folder; name a file in it",
        tmp_path / "pipe": "it is a device, a pipe or a socket, not a file",
        tmp_path / ("x" * 256): "File name too long",
        tmp_path / "x.safetensors": "torch.load reads files of that suffix as another format; "
        "use '.ckpt' or '.pt'",
    }
    before = sorted(os.listdir(tmp_path))
    for path, words in cases.items():
        with pytest.raises(CheckpointError) as caught:
            write(path, CONTENT)
        assert str(caught.value) == f"cannot save to '{path}': {words}"
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_an_address_is_not_taken_for_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("s3://bucket/x.ckpt", Path("gs://bucket/x.ckpt")):
        with pytest.raises(CheckpointError, match="begins an address; only paths of this machine"):
            write(path, CONTENT)
    assert os.listdir(tmp_path) == []


def run_child(code: str, *arguments: str, **options: Any) -> Any:
    """What a fresh interpreter prints as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


WRITE_LARGE = """
import json, os, resource, sys
import torch
from torchweft.checkpoint.file import write
from torchweft.errors import CheckpointError
path, limit, user = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if user:
    os.setuid(user)
try:
    write(path, {"large": torch.zeros(1_000_000)})
    print(json.dumps("written"))
except CheckpointError as error:
    print(json.dumps(str(error)))
"""


def test_a_file_system_that_takes_no_more_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    write(path, CONTENT)
    # A limit in the middle of the tensor, and one in the first header.
    for limit in ("100000", "100"):
        assert run_child(WRITE_LARGE, str(path), limit, "0") == (
            f"cannot save to '{path}': File too large; the file that was there is as it was"
        )
        assert same(read(path), CONTENT)
        assert os.listdir(tmp_path) == ["x.ckpt"]


def test_a_full_disk_leaves_the_previous_file(tmp_path: Path) -> None:
    # A file system of one megabyte, seen by the child alone.
    script = (
        'mount -t tmpfs -o size=1m tmpfs "$1" || exit 77; cp "$2" "$1/x.ckpt"; '
        'before=$(cksum < "$1/x.ckpt"); "$3" -c "$4" "$1/x.ckpt" 0 0; '
        'test "$before" = "$(cksum < "$1/x.ckpt")" || exit 78; test "$(ls -A "$1")" = x.ckpt'
    )
    write(tmp_path / "small.ckpt", CONTENT)
    disk = tmp_path / "disk"
    disk.mkdir()
    small = str(tmp_path / "small.ckpt")
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", disk, small, sys.executable, WRITE_LARGE],
        capture_output=True,
        text=True,
        timeout=100,
    )
    if result.returncode in (1, 77) and "denied" in result.stderr + result.stdout:
        pytest.skip("a file system can be mounted by root only")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == (
        f"cannot save to '{disk}/x.ckpt': No space left on device; the file that was there is as "
        "it was"
    )


@pytest.fixture
def foreign_folder() -> Iterator[Path]:
    """A folder that another user may read and not write."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
        os.chmod(name, 0o755)


def test_a_folder_that_may_not_be_written_is_named(foreign_folder: Path) -> None:
    path = foreign_folder / "x.ckpt"
    write(path, CONTENT)
    os.chmod(path, 0o644)
    nobody = "65534" if os.geteuid() == 0 else "0"
    os.chmod(foreign_folder, 0o555)
    assert run_child(WRITE_LARGE, str(path), "0", nobody) == (
        f"cannot save to '{path}': Permission denied; the file that was there is as it was"
    )
    assert same(read(path), CONTENT)


def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.ckpt"
    write(path, CONTENT)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, {"step": 2})
    assert same(read(path), CONTENT)
    assert os.listdir(tmp_path) == ["x.ckpt"]


# -- crashes -------------------------------------------------------------------------------------


def test_it_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        done.append(("fsync", kind))
        fsync(descriptor)

    def seen_replace(source: Any, target: Any) -> None:
        done.append(("replace", os.path.basename(target)))
        assert os.path.dirname(source) == os.path.dirname(target)
        assert torch.load(source, weights_only=True)["step"] == 7
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write(tmp_path / "x.ckpt", CONTENT)
    assert done == [("fsync", "file"), ("replace", "x.ckpt"), ("fsync", "folder")]


# Forks a writer for every line it reads, so that torch is imported once.
WRITERS = """
import os, sys
import torch
from torchweft.checkpoint.file import write
torch.set_num_threads(1)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        value = 0
        while True:
            value += 1
            write(sys.argv[1], {"a": torch.full((1_000_000,), value), "b": value,
                                "c": torch.full((1_000_000,), value)})
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    write(path, {"a": torch.zeros(2), "b": 0, "c": torch.zeros(2)})
    moment = random.Random(0)
    leftovers = 0
    with subprocess.Popen(
        [sys.executable, "-c", WRITERS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for _ in range(25):
            writers.stdin.write("\n")
            writers.stdin.flush()
            pid = int(writers.stdout.readline())
            changed = path.stat().st_mtime_ns
            # It has written at least once, and is somewhere in the next one.
            while path.stat().st_mtime_ns == changed:
                threading.Event().wait(0.001)
            threading.Event().wait(moment.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
            assert writers.stdout.readline() == "dead\n"
            content = read(path)
            assert content["b"] > 0
            assert (content["a"] == content["b"]).all()
            assert (content["c"] == content["b"]).all()
            # Each writer removed what the killed one before it left.
            assert len(temporaries(tmp_path)) <= 1
            leftovers += len(temporaries(tmp_path))
        writers.stdin.close()
        assert writers.wait(60) == 0
    assert leftovers > 0  # some were killed in the middle
    write(path, CONTENT)
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    failures: list[BaseException] = []

    def writing(number: int) -> None:
        try:
            for _ in range(20):
                write(path, {"number": number, "data": torch.full((1000,), number)})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=writing, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    content = read(path)
    assert (content["data"] == content["number"]).all()
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_files_of_others_are_not_swept(tmp_path: Path) -> None:
    for name in (".x.ckpt.tmp", ".x.ckpt.12.tmp", ".y.ckpt.12-0a1b2c3d.tmp", "x.ckpt.bak"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".x.ckpt.12-0a1b2c3d.tmp").write_text("left by a killed save")
    write(tmp_path / "x.ckpt", CONTENT)
    assert sorted(os.listdir(tmp_path)) == [
        ".x.ckpt.12.tmp",
        ".x.ckpt.tmp",
        ".y.ckpt.12-0a1b2c3d.tmp",
        "x.ckpt",
        "x.ckpt.bak",
    ]


def test_names_that_begin_alike_are_not_taken_for_one(tmp_path: Path) -> None:
    stems = {stem_of(f"{'x' * 60}{number}") for number in range(9)}
    assert len(stems) == 9
    assert all(len(stem) <= 42 for stem in stems)
    assert stem_of("x" * 40) == f".{'x' * 40}."


# -- what cannot be read -------------------------------------------------------------------------


def test_a_mapped_file_is_not_read_from_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.ckpt", CONTENT)
    load = torch.load

    def replaced(*args: Any, **options: Any) -> Any:
        write(tmp_path / "y.ckpt", CONTENT)
        os.replace(tmp_path / "y.ckpt", tmp_path / "x.ckpt")
        return load(*args, **options)

    monkeypatch.setattr("torchweft.checkpoint.file._check_written", lambda name, content: None)
    monkeypatch.setattr(torch, "load", replaced)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "x.ckpt", mapped=True)
    assert str(caught.value) == (
        f"'{tmp_path}/x.ckpt' was replaced while it was read; load it again"
    )
    assert same(read(tmp_path / "x.ckpt"), CONTENT)


def test_a_file_system_that_maps_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.ckpt", CONTENT)
    load = torch.load

    def refused(*args: Any, mmap: bool | None = None, **options: Any) -> Any:
        if mmap:
            raise RuntimeError("unable to mmap 1234 bytes from file: No such device (19)")
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", refused)
    assert same(read(tmp_path / "x.ckpt", mapped=True), CONTENT)


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "epoch-3.ckpt"
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(caught.value) == f"there is no checkpoint '{path}'; '{tmp_path}' holds no files"
    for name in ("a.txt", "epoch-1.ckpt", "epoch-2.ckpt", ".hidden"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(caught.value) == (
        f"there is no checkpoint '{path}'; '{tmp_path}' holds 'epoch-2.ckpt', 'epoch-1.ckpt', "
        "'a.txt'"
    )
    for number in range(20):
        (tmp_path / f"z{number:02}").touch()
    with pytest.raises(CheckpointError, match=r"'z04' and 15 more$"):
        read(path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"the folder '{tmp_path}/no' does not exist$"):
        read(tmp_path / "no" / "such" / "x.ckpt")
    with pytest.raises(CheckpointError, match=f"'{tmp_path}/file' is not a folder$"):
        read(tmp_path / "file" / "x.ckpt")


def test_a_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"'{tmp_path}' is a folder, not a checkpoint; '{tmp_path}' holds 'last.ckpt'"
    )


def written(legacy: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.ckpt")
        if legacy:
            torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
        else:
            write(path, CONTENT)
        return Path(path).read_bytes()


ZIP, LEGACY = written(legacy=False), written(legacy=True)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, len(ZIP) - 1))
@example(0)
@example(1)
@example(3)
@example(4)
@example(len(ZIP) - 1)
@example(len(ZIP) - 22)
def test_a_truncated_file_is_an_error_that_says_so(length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.ckpt")
        Path(path).write_bytes(ZIP[:length])
        for weights_only in (True, False):
            with pytest.raises(CheckpointError) as caught:
                read(path, weights_only=weights_only)
            if length == 0:
                assert str(caught.value) == f"'{path}' is empty, not a checkpoint"
            elif length >= 4:
                assert str(caught.value) == (
                    f"'{path}' is truncated: {length} bytes and no end of the archive"
                )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(LEGACY) - 1))
def test_a_truncated_file_of_an_older_torch_is_an_error(length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.ckpt")
        Path(path).write_bytes(LEGACY[:length])
        with pytest.raises(CheckpointError, match=r"x\.ckpt' (is empty|cannot be read)"):
            read(path)


@settings(max_examples=80, deadline=None)
@given(st.binary(min_size=1, max_size=64))
@example(b"hello world\n")
@example(b"PK\x03\x04")
@example(b"PK\x05\x06" + bytes(18))
def test_any_other_file_is_an_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.ckpt")
        Path(path).write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x\.ckpt'"):
            read(path)


def test_what_is_not_of_torch_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello world")
    with pytest.raises(
        CheckpointError, match=r"may be damaged, or written by something other than torch\.save$"
    ):
        read(tmp_path / "notes.txt")


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_from_the_file_is_run(tmp_path: Path, legacy: bool) -> None:
    path, mark = tmp_path / "x.ckpt", tmp_path / "mark"
    torch.save({"a": Malicious(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert not mark.exists()
    assert str(caught.value) == (
        f"'{path}' holds objects that are not safe to load: posix.system; loading them may run "
        "code. Only if you trust whoever wrote the file, pass weights_only=False, or allow these "
        "alone with torch.serialization.add_safe_globals()"
    )
    read(path, weights_only=False)
    assert mark.exists()


def test_every_unsafe_class_is_named_and_trust_is_possible(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"a": argparse.Namespace(lr=1), "b": collections.deque([1])}, path)
    with pytest.raises(CheckpointError, match=r"load: argparse.Namespace, collections.deque;"):
        read(path)
    assert read(path, weights_only=False)["a"].lr == 1


def test_a_class_that_is_not_here_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    code = (
        "import sys, types, torch; m = sys.modules['gone'] = types.ModuleType('gone');"
        "exec('class Thing: pass', m.__dict__); m.Thing.__module__ = 'gone';"
        "torch.save({'a': m.Thing()}, sys.argv[1]); print(1)"
    )
    assert run_child(code, path) == 1
    with pytest.raises(CheckpointError, match=r"not safe to load: gone\.Thing;"):
        read(path)
    with pytest.raises(CheckpointError) as caught:
        read(path, weights_only=False)
    assert str(caught.value) == (
        f"'{path}' holds objects of a class that is not here: ModuleNotFoundError: No module named "
        "'gone'"
    )


def test_tensors_come_to_the_place_that_was_asked(tmp_path: Path) -> None:
    write(tmp_path / "x.ckpt", CONTENT)
    assert read(tmp_path / "x.ckpt", map_location="meta")["model"]["w"].is_meta
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint: RuntimeError"):
        read(tmp_path / "x.ckpt", map_location="nowhere")
