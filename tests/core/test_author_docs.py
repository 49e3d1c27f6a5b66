"""``docs/plugins``: every code block does what the page says."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.pages import Block, Runner, blocks, environment

PAGES = Path(__file__).parents[2] / "docs" / "plugins"

#: Run in a fresh environment, by the end-to-end tests.
ELSEWHERE = {"tutorial.md"}

HERE = sorted(page.name for page in PAGES.glob("*.md") if page.name not in ELSEWHERE)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """A folder that Python imports from, in this process and in commands."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TORCHWEFT_")]:
        monkeypatch.delenv(name)
    outside, loaded = dict(os.environ), set(sys.modules)
    yield Runner(tmp_path, environment(PYTHONPATH=str(tmp_path)))
    os.environ.clear()
    os.environ.update(outside)
    for name in set(sys.modules) - loaded:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def install(folder: Path, distribution: str, version: str, entry_point: str) -> None:
    """Make the modules in a folder on the path those of a distribution."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata)
    (info / "entry_points.txt").write_text(f"[torchweft]\n{entry_point}\n")


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


@pytest.mark.parametrize("page", sorted(page.name for page in PAGES.glob("*.md")))
def test_every_link_leads_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (PAGES / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        there = (PAGES / page).parent / path if path else PAGES / page
        assert there.is_file(), target
        headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in map(slug, headings), target


@pytest.mark.parametrize("page", HERE)
def test_every_code_block_of_a_page(page: str, runner: Runner) -> None:
    if page == "debugging.md":
        install(runner.folder, "torchweft-acme", "0.1", "acme = acme_hooks")
    for block in blocks(PAGES / page):
        runner.run(block)


# -- that a page which is wrong is noticed ---------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("python", "assert 1 + 1 == 3\n"),
        ("pycon", ">>> 1 + 1\n3\n"),
        ("pycon", ">>> int('x')\nTraceback (most recent call last):\n  ...\nValueError: …no…\n"),
        ("pycon", "1 + 1\n"),
        ("console", "$ echo three\nfour\n"),
        ("console", "$ echo one two three\none … four\n"),
        ("console", "$ false\n"),
        ("console", "echo three\n"),
        ("yaml", "a: 3\n"),
    ],
)
def test_a_block_that_is_wrong_is_noticed(word: str, text: str, runner: Runner) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        runner.run(Block(word=word, text=text, place="here"))


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("pycon", ">>> print('one  two\\n\\nthree')\none two\nthree\n"),
        ("pycon", ">>> int('x')\nTraceback (most recent call last):\n  ...\nValueError: …'x'\n"),
        ("console", "$ echo one two three; false\none …ee\n$ true\n"),
        ("console", "$ echo one \\\n    two\none two\n"),
    ],
)
def test_a_block_that_is_right_is_left_alone(word: str, text: str, runner: Runner) -> None:
    runner.run(Block(word=word, text=text, place="here"))


@pytest.mark.parametrize("text", ["- a list\n  ```python\n  1\n  ```\n", "```python\n1\n"])
def test_a_block_that_would_not_be_run_is_noticed(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=r"^page\.md has a fence that is not understood"):
        blocks(page)
