from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from torchweft import process
from torchweft.errors import Misuse
from torchweft.process import failure


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv(process.ERROR_FILE, str(path))
    monkeypatch.setattr(sys, "last_value", None, raising=False)
    return path


def caught(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as same:
        return same


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("it is full"), False),
        # The script's own, of a service or of a pipe.
        (ConnectionRefusedError(111, "Connection refused"), False),
        (BrokenPipeError(32, "Broken pipe"), False),
    ],
)
def test_who_lost_another_rank(error: Exception, lost: bool) -> None:
    assert failure.lost_peer(error) == lost


def test_the_file_is_torch_s_own(error_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    error = caught(ValueError("no"))
    process.record_failure(error)
    message = json.loads(error_file.read_text())["message"]
    assert message["message"] == "ValueError: no"
    extra = message["extraInfo"]
    assert extra["py_callstack"].endswith("    raise error\nValueError: no\n")
    assert (extra["rank"], extra["lost_peer"]) == (3, False)
    assert extra["timestamp"] == str(extra["time_ns"] // 10**9)
    assert sys.last_value is error
    assert [path.name for path in error_file.parent.iterdir()] == ["error.json"]


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5", True),
        ("Connection reset by peer", True),
        ("NCCL communicator was aborted on rank 1", True),
        ("shapes do not fit", False),
    ],
)
def test_a_lost_peer_is_told_apart(words: str, lost: bool, error_file: Path) -> None:
    process.record_failure(RuntimeError(words))
    assert json.loads(error_file.read_text())["message"]["extraInfo"]["lost_peer"] is lost


class Silent(Exception):
    def __str__(self) -> NoReturn:
        raise KeyError("nothing to say")


def test_an_exception_that_cannot_say_what_it_is(error_file: Path) -> None:
    process.record_failure(caught(Silent()))
    message = json.loads(error_file.read_text())["message"]
    assert message["message"] == "Silent: <its message cannot be made: KeyError>"
    assert "<exception str() failed>" in message["extraInfo"]["py_callstack"]


def test_an_exception_without_words(error_file: Path) -> None:
    process.record_failure(MemoryError())
    assert json.loads(error_file.read_text())["message"]["message"] == "MemoryError"


class Unpicklable(Exception):
    def __init__(self, lock: object) -> None:
        super().__init__("holds a lock")
        self.lock = lock

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle this")


def test_an_exception_that_cannot_be_pickled(error_file: Path) -> None:
    process.record_failure(caught(Unpicklable(object())))
    assert json.loads(error_file.read_text())["message"]["message"] == "Unpicklable: holds a lock"


def test_characters_that_no_encoding_has(error_file: Path) -> None:
    process.record_failure(ValueError("half \ud800 a pair"))
    assert json.loads(error_file.read_text())["message"]["message"].endswith("half \ud800 a pair")


def test_causes_are_told_with_it() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as cause:
            raise ValueError("second") from cause
    except ValueError as error:
        told = process.format_error(error)
    assert told.index("KeyError: 'first'") < told.index("direct cause") < told.index("second")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="groups came with Python 3.11")
def test_a_group_is_told_whole() -> None:
    group = getattr(__builtins__, "ExceptionGroup", None) or __builtins__["ExceptionGroup"]
    told = process.format_error(caught(group("both", [ValueError("one"), KeyError("two")])))
    assert "both (2 sub-exceptions)" in told
    assert "ValueError: one" in told
    assert "KeyError: 'two'" in told


def made(filename: str, source: str, **names: object) -> types.ModuleType:
    """A module as if it stood in that file."""
    module = types.ModuleType("made")
    vars(module).update(names)
    exec(compile(source, filename, "exec"), vars(module))
    return module


def raised_by(function: Callable[[], object]) -> BaseException:
    """What it raised, without the frames of this file."""
    with pytest.raises(ValueError, match=r".") as caught:
        function()
    trace = caught.value.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return caught.value.with_traceback(trace)


PACKAGE = str(Path(process.__file__).parents[1])


def frames(error: BaseException) -> list[str]:
    lines = process.format_error(error).splitlines()
    return [line.split('"')[1] for line in lines if line.startswith("  File ")]


def test_frames_that_led_into_user_code_are_left_out() -> None:
    user = made("/home/user/train.py", "def train():\n    raise ValueError('no')\n")
    ours = made(f"{PACKAGE}/process/script.py", "def run(f):\n    f()\n")
    try:
        ours.run(user.train)
    except ValueError as error:
        error.__traceback__ = error.__traceback__.tb_next  # type: ignore[union-attr]
        assert frames(error) == ["/home/user/train.py"]  # noqa: PT017 - its frames are the matter


@pytest.mark.parametrize(
    "file", [f"{PACKAGE}_cuda/ddp.py", "/home/user/my_multiprocessing/train.py"]
)
def test_a_name_that_resembles_ours_is_not_ours(file: str) -> None:
    user = made(file, "def train():\n    raise ValueError('no')\n")
    with pytest.raises(ValueError, match="no") as caught:
        user.train()
    assert frames(caught.value)[-1] == file
    assert not failure._is_ours(types.SimpleNamespace(filename=file))  # type: ignore[arg-type]


def test_frames_inside_torchweft_tell_nothing_of_an_error_on_purpose() -> None:
    ours = made(
        f"{PACKAGE}/fabric.py", "def launch():\n    raise Misuse('called twice')\n", Misuse=Misuse
    )
    user = made("/home/user/train.py", "def train():\n    launch()\n", launch=ours.launch)
    with pytest.raises(Misuse) as caught:
        user.train()
    assert frames(caught.value)[-1] == "/home/user/train.py"
    assert process.format_error(caught.value).endswith("torchweft.errors.Misuse: called twice\n")


def test_an_error_of_torchweft_alone_keeps_its_frames() -> None:
    ours = made(f"{PACKAGE}/worker.py", "def join():\n    raise ValueError('a bug')\n")
    try:
        ours.join()
    except ValueError as error:
        error.__traceback__ = error.__traceback__.tb_next  # type: ignore[union-attr]
        assert frames(error) == [f"{PACKAGE}/worker.py"]  # noqa: PT017 - its frames are the matter


def test_without_a_file_it_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(process.ERROR_FILE, raising=False)
    monkeypatch.setattr(sys, "last_value", None, raising=False)
    process.record_failure(ValueError("no"))
    assert capsys.readouterr().err == "ValueError: no\n"


def test_a_file_that_cannot_be_written_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(process.ERROR_FILE, str(tmp_path / "gone" / "error.json"))
    monkeypatch.setattr(sys, "last_value", None, raising=False)
    process.record_failure(ValueError("no"))
    assert capsys.readouterr().err == "ValueError: no\n"
