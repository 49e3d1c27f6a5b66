from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft.errors import InvalidRequest, UnknownOption
from torchweft.options import check_options, fits, spell_type

if TYPE_CHECKING:
    from decimal import Decimal


class Acme:
    def __init__(
        self,
        module: object = None,
        /,
        plain: Any = None,
        *,
        flag: bool = False,
        bucket: int = 25,
        ratio: float = 0.5,
        backend: str | None = None,
        reduce: Literal["sum", "mean"] = "mean",
    ) -> None: ...


class Needy:
    def __init__(self, *, bucket: int) -> None: ...


class Open:
    def __init__(self, *, flag: bool = False, **more: int) -> None: ...


class Unresolvable:
    def __init__(self, *, amount: Decimal | None = None, flag: bool = False) -> None: ...


class Plain: ...


def check(cls: Any, **options: Any) -> None:
    check_options("strategy", "acme", cls, options)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Acme, {}),
        (Acme, {"flag": True, "bucket": 1, "ratio": 2, "backend": None, "reduce": "sum"}),
        (Acme, {"backend": "nccl", "ratio": 0.1, "plain": object()}),
        (Needy, {"bucket": 1}),
        (Open, {"anything": "goes"}),
        (Unresolvable, {"amount": "1", "flag": "nobody knows"}),
        (Plain, {}),
        (lambda bucket=1: None, {"bucket": 2}),
    ],
)
def test_options_that_fit(cls: Any, options: dict[str, Any]) -> None:
    check(cls, **options)


def test_an_unknown_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownOption) as caught:
        check(Acme, buckets=25)
    assert str(caught.value) == (
        "strategy 'acme' has no option 'buckets'; did you mean 'bucket'? "
        "options of Acme: backend, bucket, flag, plain, ratio, reduce"
    )


@pytest.mark.parametrize("option", ["module", "self", "zzz"])
def test_what_cannot_be_given_by_name_is_no_option(option: str) -> None:
    with pytest.raises(UnknownOption, match=rf"has no option '{option}'; options of Acme: backend"):
        check(Acme, **{option: 1})


def test_a_class_without_options() -> None:
    with pytest.raises(UnknownOption, match=r"has no option 'a'; options of Plain: none$"):
        check(Plain, a=1)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("flag", 1, "strategy 'acme' takes flag as bool, not 1"),
        ("flag", "yes", "strategy 'acme' takes flag as bool, not 'yes'"),
        ("bucket", 2.5, "strategy 'acme' takes bucket as int, not 2.5"),
        ("bucket", True, "strategy 'acme' takes bucket as int, not True"),
        ("bucket", None, "strategy 'acme' takes bucket as int, not None"),
        ("ratio", "half", "strategy 'acme' takes ratio as float, not 'half'"),
        ("ratio", True, "strategy 'acme' takes ratio as float, not True"),
        ("backend", 7, "strategy 'acme' takes backend as str | None, not 7"),
        ("reduce", "max", "strategy 'acme' takes reduce as 'sum' | 'mean', not 'max'"),
    ],
)
def test_a_value_of_another_type(option: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(Acme, **{option: value})
    assert str(caught.value) == words


def test_a_required_option_is_asked_for() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^strategy 'acme' needs the option 'bucket'; write strategy='acme:bucket=…'$",
    ):
        check(Needy)


@pytest.mark.parametrize(
    ("value", "hint", "answer"),
    [
        (("a", "b"), tuple[str, ...], True),
        ((), tuple[str, ...], True),
        (("a", 1), tuple[str, ...], False),
        (["a"], tuple[str, ...], False),
        ("ab", tuple[str, ...], False),
        ((1, "a"), tuple[int, str], True),
        (True, Literal[1], False),
        (1, Literal[1, "all"], True),
        ({}, dict[str, int], True),
    ],
)
def test_fits(value: Any, hint: Any, answer: bool) -> None:
    assert fits(value, hint) is answer


@given(st.one_of(st.booleans(), st.integers(), st.floats(), st.text(), st.none()))
def test_a_union_takes_what_one_of_its_members_takes(value: Any) -> None:
    members = (bool, int, float, str, type(None))
    assert fits(value, bool | int | float | str | None)
    assert [fits(value, member) for member in members].count(True) == (
        2 if type(value) is int else 1
    )
    assert fits(value, Optional[int]) == (type(value) is int or value is None)  # noqa: UP045


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "int"),
        (type(None), "None"),
        (int | None, "int | None"),
        (Optional[str], "str | None"),  # noqa: UP045
        (Literal["a", 1], "'a' | 1"),
        (int | Literal["all"], "int | 'all'"),
        (tuple[str, ...], "tuple[str, ...]"),
    ],
)
def test_types_as_messages_spell_them(hint: Any, words: str) -> None:
    assert spell_type(hint) == words
