"""Real ranks for a test: what comes back, and what is told of those that do not come back."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from torchweft.errors import InvalidRequest, RankFailed, TorchweftError
from torchweft.testing import RanksTimeout, run_ranks


def who(fabric, word):
    return fabric.global_rank, fabric.world_size, word, torch.full((2,), fabric.global_rank)


def test_it_returns_what_each_rank_returned():
    told = run_ranks(2, who, "word", strategy="ddp")
    assert [answer[:3] for answer in told] == [(0, 2, "word"), (1, 2, "word")]
    assert [answer[3].tolist() for answer in told] == [[0, 0], [1, 1]]


def environment(fabric):
    return os.environ.get("OF_A_TEST"), os.getpid()


def test_variables_are_the_ranks_alone():
    ((value, pid),) = run_ranks(1, environment, environ={"OF_A_TEST": "yes"})
    assert value == "yes"
    assert pid != os.getpid()
    assert "OF_A_TEST" not in os.environ


def fails(fabric):
    if fabric.global_rank == 1:
        raise ValueError("one has had enough")
    fabric.barrier()


def test_a_rank_that_fails_is_the_caller_s_error():
    with pytest.raises(RankFailed, match=r"^rank 1 of 2 failed: ValueError: one has had enough"):
        run_ranks(2, fails, strategy="ddp")


def hangs(fabric):
    if fabric.global_rank == 1:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        time.sleep(60)
    fabric.barrier()


def test_time_that_is_up_is_told_with_the_line_of_every_rank():
    line = hangs.__code__.co_firstlineno
    with pytest.raises(RanksTimeout) as late:
        run_ranks(2, hangs, strategy="ddp", timeout=1.5)
    told = str(late.value).splitlines()
    assert told[:3] == [
        "after 1.5 s 2 of 2 ranks were not done",
        f"rank 0: test_testing_ranks.py, line {line + 4} in hangs, in barrier()",
        f"rank 1: test_testing_ranks.py, line {line + 3} in hangs",
    ]
    assert "the stacks of rank 0, innermost call first:" in told
    assert "the stacks of rank 1, innermost call first:" in told


def leaves(fabric):
    if fabric.global_rank == 0:
        fabric.barrier()


def test_a_rank_that_is_done_is_told_from_those_that_wait():
    with pytest.raises((RanksTimeout, RankFailed)) as late:
        run_ranks(2, leaves, strategy="ddp", timeout=1.5)
    told = str(late.value)
    assert "rank 1: done" in told or "rank 1, which was done" in told


def test_no_rank_is_left_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(RanksTimeout):
        run_ranks(1, sleeps, timeout=0.5, environ={"MARK_OF_THESE_RANKS": str(tmp_path)})
    assert list(tmp_path.glob("torchweft-*")) == []
    mark = f"MARK_OF_THESE_RANKS={tmp_path}".encode()
    assert [p for p in Path("/proc").glob("[0-9]*") if mark in variables(p)] == []


def sleeps(fabric):
    time.sleep(60)


def variables(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def test_a_function_made_in_a_function_is_refused():
    with pytest.raises(InvalidRequest, match="which ranks cannot import; define it with def"):
        run_ranks(1, lambda fabric: None)


def returns_a_lock(fabric):
    return threading.Lock() if fabric.global_rank == 1 else None


def test_what_cannot_be_pickled_is_named_with_its_rank():
    with pytest.raises(TorchweftError, match=r"returned a _thread.lock in rank 1"):
        run_ranks(2, returns_a_lock, strategy="ddp")


def test_a_module_that_no_import_finds_is_loaded_from_its_file(tmp_path):
    import importlib.util
    import sys

    file = tmp_path / "of_no_path.py"
    file.write_text("def answer(fabric):\n    return 42\n")
    spec = importlib.util.spec_from_file_location("of_no_path", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["of_no_path"] = module
    spec.loader.exec_module(module)
    try:
        assert run_ranks(1, module.answer) == [42]
    finally:
        del sys.modules["of_no_path"]


def test_the_fixture_is_the_function(request):
    assert request.getfixturevalue("run_ranks") is run_ranks
