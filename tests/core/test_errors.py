from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft import errors


@pytest.mark.parametrize(
    "name", [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
)
def test_every_error_is_caught_by_the_base(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.TorchweftError)


@pytest.mark.parametrize("name", ["InvalidRequest", "UnknownName", "UnknownOption"])
def test_a_bad_value_is_a_value_error_too(name: str) -> None:
    assert issubclass(getattr(errors, name), ValueError)


def test_a_failed_rank_survives_pickling() -> None:
    failure = errors.RankFailed("rank 3 failed", rank=3, exit_status=137)
    back = pickle.loads(pickle.dumps(failure))
    assert (type(back), str(back), back.rank, back.exit_status) == (
        errors.RankFailed,
        "rank 3 failed",
        3,
        137,
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepsped", "; did you mean 'deepspeed'?"),
        ("DDP", ""),
        ("quite different", ""),
        ("", ""),
    ],
)
def test_did_you_mean(name: str, words: str) -> None:
    assert errors.did_you_mean(name, ["ddp", "deepspeed", "fsdp"]) == words


@given(st.text(max_size=12), st.sets(st.text(max_size=12), max_size=6))
def test_did_you_mean_names_a_known_name_whatever_their_order(name: str, known: set[str]) -> None:
    words = errors.did_you_mean(name, sorted(known))
    assert words == errors.did_you_mean(name, sorted(known, reverse=True))
    assert words == "" or any(words == f"; did you mean '{each}'?" for each in known)


def test_a_long_list_says_how_many_more_there_are() -> None:
    assert errors.listed([]) == ""
    assert errors.listed(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert errors.listed(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"
    assert errors.listed(["a", "b"], shown=1) == "a and 1 more"
