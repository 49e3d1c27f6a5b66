from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft.errors import InvalidRequest
from torchweft.handoff import VARIABLE, Handoff

FLAGS = st.dictionaries(
    st.sampled_from(["accelerator", "devices", "strategy"]),
    st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers(), max_size=3)),
)


@given(st.text(min_size=1), st.text(), FLAGS)
def test_what_was_handed_to_this_process_is_read_back(
    run_id: str, launcher: str, flags: dict[str, object]
) -> None:
    handoff = Handoff(run_id=run_id, launcher=launcher, flags=flags, pid=os.getpid())
    assert Handoff.read(handoff.to_environ()) == handoff
    assert not Handoff.stale(handoff.to_environ())


def test_what_was_handed_to_all_children_of_the_parent_is_this_process_s_too() -> None:
    handoff = Handoff(run_id="run", parent=os.getppid())
    assert Handoff.read(handoff.to_environ()) == handoff


@pytest.mark.parametrize("environ", [{}, {VARIABLE: ""}])
def test_nothing_was_handed_over(environ: dict[str, str]) -> None:
    assert Handoff.read(environ) is None
    assert not Handoff.stale(environ)


@pytest.mark.parametrize(
    "handoff",
    [
        Handoff(run_id="run"),
        Handoff(run_id="run", pid=os.getppid()),
        Handoff(run_id="run", parent=os.getpid()),
    ],
)
def test_what_was_meant_for_others_changes_nothing(handoff: Handoff) -> None:
    assert Handoff.read(handoff.to_environ()) is None
    assert Handoff.stale(handoff.to_environ())


CHILD = "import os; from torchweft.handoff import Handoff; print(Handoff.read(os.environ))"


def test_a_child_reads_it_and_a_grandchild_does_not() -> None:
    environ = {**os.environ, **Handoff(run_id="run", parent=os.getpid()).to_environ()}
    again = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}], check=True)"
    for code, expected in ((CHILD, "Handoff(run_id='run'"), (again, "None")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout.startswith(expected)


GOOD = {"run_id": "run", "launcher": "", "flags": {}, "pid": None, "parent": None}


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "true",
        "yes",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({**GOOD, "other": 1}),
        json.dumps({**GOOD, "run_id": 7}),
        json.dumps({**GOOD, "launcher": None}),
        json.dumps({**GOOD, "flags": []}),
        json.dumps({**GOOD, "pid": "12"}),
        json.dumps({**GOOD, "parent": 1.5}),
    ],
)
def test_what_nobody_here_wrote_is_an_error(text: str) -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^the environment variable TORCHWEFT_RUN is '.{1,80}', which 'torchweft run' never "
        r"writes; it is not meant to be set by hand: unset TORCHWEFT_RUN$",
    ):
        Handoff.read({VARIABLE: text})


@given(st.text())
def test_no_text_ends_in_another_error(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        assert Handoff.read({VARIABLE: text}) is None
