from __future__ import annotations

from typing import Any

import pytest

from torchweft.testing.constructor import needed, not_keywords, undocumented, untyped


class Elsewhere:
    def __init__(self, *, width: int = 1, depth: int = 1) -> None: ...


def make(text: str | None, base: type = object) -> Any:
    """A class with the options k and kk and that docstring."""

    class Made(base):  # type: ignore[misc]
        def __init__(self, *, k: int = 1, kk: int = 1) -> None: ...

    Made.__doc__ = text
    return Made


@pytest.mark.parametrize(
    "text",
    [
        "Args:\n    k: how many.\n    kk: how many more.",
        "Args:\n    k, kk: how many.",
        "Args:\n    k (int): how many.\n    kk (Optional[int]): more.",
        "Parameters\n----------\nk : int\n    How many.\nkk : int\n    More.",
        ":param k: how many\n:param int kk: more",
        ":keyword k: how many\n:keyword kk: more",
        "- ``k``: how many\n- *kk*: more",
    ],
    ids=["google", "several", "with types", "numpy", "sphinx", "keyword", "list"],
)
def test_every_common_way_to_describe_an_option(text: str) -> None:
    assert undocumented(make(f"What it is.\n\n{text}")) == []


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "It takes k and kk.",
        "The k is here: of no use. kkk: neither. my-k: nor this.",
        "``torch.nn.no_such_class`` and ``k.kk`` and ``os.path``",
    ],
)
def test_what_is_no_description(text: str | None) -> None:
    assert undocumented(make(text)) == ["k", "kk"]


def test_a_class_that_is_named_by_its_whole_path_describes_its_keywords() -> None:
    named = "Keywords are those of ``torch.utils.data.DataLoader``."

    class Made:
        __doc__ = named

        def __init__(self, *, batch_size: int = 1, mine: int = 1, pin_memory: bool = True): ...

    assert undocumented(Made) == ["mine"]
    Made.__doc__ = named.replace("``", "`")
    assert undocumented(Made) == ["batch_size", "mine", "pin_memory"]
    Made.__doc__ = "As ``torch.utils.data.DataLoader()``.\n\nArgs:\n    mine: another."
    assert undocumented(Made) == []


def test_a_base_class_and_a_constructor_may_describe_them() -> None:
    base = make("Args:\n    k: how many.")

    class Made(base):  # type: ignore[misc]
        """Has a docstring without options."""

        def __init__(self, *, k: int = 1, kk: int = 1, kkk: int = 1) -> None:
            """Args:
            kk: more.
            """

    assert undocumented(Made) == ["kkk"]

    class Heir(Made):
        """Inherits the constructor too."""

    assert undocumented(Heir) == ["kkk"]


def test_what_is_no_keyword_has_no_type_and_must_be_given() -> None:
    class Made:
        def __init__(self, a, /, b: int, *more, c=1, **rest) -> None: ...  # type: ignore[no-untyped-def]

    assert not_keywords(Made) == ["a", "*more"]
    assert untyped(Made) == ["c"]
    assert needed(Made) == ["b"]
    assert undocumented(Made) == ["b", "c"]


def test_a_class_without_a_constructor_has_no_options() -> None:
    class Made: ...

    assert (not_keywords(Made), untyped(Made), needed(Made), undocumented(Made)) == ([], [], [], [])
