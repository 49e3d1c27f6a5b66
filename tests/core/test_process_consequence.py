from __future__ import annotations

import pytest
from tests.core.fresh_python import python

RAISE = """
import sys
from torchweft import process
process.shorten_lost_peers(1, 4)
process.shorten_lost_peers(1, 4)  # as a second launch does
def script():
    raise {error}
script()
"""
HAPPENED = "[pair.cc:553] Connection closed by peer [10.0.0.1]:16613. "
LOST = f"RuntimeError({HAPPENED!r} + 'Advice. ' * 40)"


def printed(error: str, trace: str | None = None) -> tuple[int, str]:
    done = python(RAISE.format(error=error), environ={"TORCHWEFT_TRACE": trace})
    return done.returncode, done.stderr


def test_a_rank_that_lost_another_one_says_so_in_a_line() -> None:
    status, words = printed(LOST)
    assert status == 1
    assert words.startswith(
        "torchweft: rank 1 of 4 ends because it lost another rank, which says why it failed "
        f"(RuntimeError: {HAPPENED}Advice. "
    )
    assert words.endswith(" …); TORCHWEFT_TRACE=1 shows where\n")
    assert len(words.splitlines()) == 1
    assert len(words) < 320


def test_its_traceback_is_there_for_who_asks() -> None:
    status, words = printed(LOST, trace="1")
    assert status == 1
    assert words.count("in script\n") == 1
    assert "lost another rank" not in words


@pytest.mark.parametrize(
    "error",
    ["ValueError('enough')", "ConnectionRefusedError(111, 'Connection refused')", "SystemError()"],
)
def test_any_other_error_is_shown_with_its_traceback(error: str) -> None:
    status, words = printed(error)
    assert status == 1
    assert words.count("in script\n") == 1
    assert "lost another rank" not in words
