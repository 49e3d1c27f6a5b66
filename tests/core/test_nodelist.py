"""What SLURM writes short, compared with SLURM's own reading where that is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchweft.builtin.launchers.nodelist import hosts
from torchweft.errors import InvalidRequest

#: It reads nothing of its configuration but that there is one.
CONFIGURATION = "ClusterName=none\nSlurmctldHost=localhost\nNodeName=a\nPartitionName=p Nodes=ALL\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", "a"),
        ("a[01-03,7],b-1,c[1-2]x[3-4]", "a01 a02 a03 a7 b-1 c1x3 c1x4 c2x3 c2x4"),
        ("a[08-12]", "a08 a09 a10 a11 a12"),
        ("a[1-010]", "a1 a2 a3 a4 a5 a6 a7 a8 a9 a10"),
        ("a[99-101],a[099-101]", "a99 a100 a101 a099 a100 a101"),
        ("a[3,1-2],a3", "a3 a1 a2 a3"),
        ("a[0],a[00-01]", "a0 a00 a01"),
        ("[1-2]", "1 2"),
        ("n1.example.org,m_2", "n1.example.org m_2"),
        ("n[1-2]-ib", "n1-ib n2-ib"),
        (" a , b", "a b"),
        ("a,,b,", "a b"),
        ("", ""),
    ],
)
def test_lists(text: str, names: str) -> None:
    assert list(hosts(text)) == names.split()


@pytest.mark.parametrize(
    "text",
    [
        "a[1",
        "a]",
        "a[]",
        "a[1-]",
        "a[-1]",
        "a[2-1]",
        "a[010-8]",
        "a[x-z]",
        "a[1,,2]",
        "a b",
        "[[1]]",
    ],
)
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        list(hosts(text))
    assert str(raised.value) == (
        f"the list of nodes '{text}' cannot be read; SLURM writes names with ranges in brackets, "
        "such as a[01-03,7],b"
    )


def test_the_first_of_very_many() -> None:
    assert next(hosts("a[1-1000000000000]x[1-1000000000000]")) == "a1x1"


# -- any list ---------------------------------------------------------------------------------

PREFIXES = st.from_regex(r"[a-z]([a-z0-9-]*[a-z-])?", fullmatch=True).filter(lambda s: len(s) < 12)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, list[str]]:
    """One range as it is written, and the numbers that it stands for."""
    first = draw(st.integers(0, 1200))
    last = first + draw(st.integers(0, 12))
    width = draw(st.integers(1, 6))
    numbers = [str(number).zfill(width) for number in range(first, last + 1)]
    one = first == last and draw(st.booleans())
    return (numbers[0] if one else f"{numbers[0]}-{numbers[-1]}"), numbers


@st.composite
def words(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A word of a list, and its names."""
    prefix = draw(PREFIXES)
    listed = draw(st.lists(ranges(), max_size=3))
    if not listed:
        return prefix, [prefix]
    text = f"{prefix}[{','.join(written for written, _ in listed)}]"
    return text, [f"{prefix}{number}" for _, numbers in listed for number in numbers]


LISTS = st.lists(words(), min_size=1, max_size=4)


@given(LISTS)
def test_every_name_in_its_turn(listed: list[tuple[str, list[str]]]) -> None:
    text = ",".join(word for word, _ in listed)
    assert list(hosts(text)) == [name for _, names in listed for name in names]


@given(st.text(alphabet="ab01[],- x", max_size=30))
def test_any_text_is_a_list_or_an_error(text: str) -> None:
    try:
        names = list(hosts(text))
    except InvalidRequest:
        return
    assert all(name and not set(name) & set("[], ") for name in names)


@pytest.fixture(scope="module")
def scontrol(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """SLURM's own command, with a configuration."""
    command = shutil.which("scontrol")
    if command is None:
        pytest.skip("scontrol is not installed (slurm-client)")
    path: Path = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    path.write_text(CONFIGURATION)
    return command, {"SLURM_CONF": str(path)}


@settings(max_examples=60)
@given(listed=LISTS)
def test_slurm_reads_the_same(
    scontrol: tuple[str, dict[str, str]], listed: list[tuple[str, list[str]]]
) -> None:
    command, environ = scontrol
    text = ",".join(word for word, _ in listed)
    done = subprocess.run(
        [command, "show", "hostnames", text],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(hosts(text)) == done.stdout.split()


@pytest.mark.parametrize("text", ["c[1-2]x[3-4]", "x[1-2][3-4]", "a[1-2]x[3,5-6]y[01-02],b"])
def test_slurm_reads_several_brackets_the_same(
    scontrol: tuple[str, dict[str, str]], text: str
) -> None:
    command, environ = scontrol
    done = subprocess.run(
        [command, "show", "hostnames", text],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    found = list(hosts(text))
    assert sorted(found) == sorted(done.stdout.split())
    # SLURM itself has a turn of its own for the others where a bracket holds several ranges.
    assert found[0] == done.stdout.split()[0]
