"""Progress: every item passes, a terminal gets a bar, a file gets few lines, nothing stays open."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator

import pytest
from torch.utils.data import DataLoader, IterableDataset

from torchweft.progress import Bars, track


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Stream(IterableDataset[int]):
    """Without a length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_where_nothing_is_shown_the_items_pass(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "train", show=False)) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("iterable", "count", "line"),
    [
        (range(3), 3, "train: 3/3 in 0:00:00\n"),
        (iter(range(3)), 3, "train: 3 in 0:00:00\n"),
        (DataLoader([0, 1, 2], batch_size=2), 2, "train: 2/2 in 0:00:00\n"),
        (DataLoader(Stream(), batch_size=2), 2, "train: 2 in 0:00:00\n"),
        ([], 0, "train: 0/0 in 0:00:00\n"),
    ],
)
def test_a_short_loop_is_one_line_on_stderr(
    iterable: Iterable[object], count: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(list(Bars(Clock()).track(iterable, "train", show=True))) == count
    assert capfd.readouterr() == ("", line)


def test_a_total_that_is_given_counts(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(Bars(Clock()).track(iter("ab"), total=5, show=True)) == ["a", "b"]
    assert capfd.readouterr().err == "2/5 in 0:00:00\n"


def test_a_long_loop_is_a_handful_of_lines(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    for _ in Bars(clock).track(range(3600), "train", show=True):
        clock.now += 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == [
        "train: 10/3600 in 0:00:10, about 0:59:50 to go",
        "train: 20/3600 in 0:00:20, about 0:59:40 to go",
    ]
    assert lines[-1] == "train: 3600/3600 in 1:00:00"
    assert len(lines) == 10


def test_items_slower_than_the_lines(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    for _ in Bars(clock).track(iter(range(3)), show=True):
        clock.now += 100
    assert capfd.readouterr().err.splitlines() == [
        "1 in 0:01:40",
        "2 in 0:03:20",
        "3 in 0:05:00",
    ]


def test_a_loop_that_is_left_says_so_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    for item in Bars(Clock()).track(range(9), "train", show=True):
        if item == 4:
            break
    assert capfd.readouterr().err == "train: 4/9 when it stopped after 0:00:00\n"
    with pytest.raises(ValueError, match="boom"):
        for _ in Bars(Clock()).track(range(9), "train", show=True):
            raise ValueError("boom")
    assert capfd.readouterr().err == "train: 0/9 when it stopped after 0:00:00\n"


def test_an_iterable_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(Bars(Clock()).track(failing(), show=True))
    assert capfd.readouterr().err == "1 when it stopped after 0:00:00\n"


def test_short_loops_within_a_loop_are_not_told(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    bars = Bars(clock)
    for epoch in bars.track(range(3), "epochs", show=True):
        for _ in bars.track(range(2), "batches", show=True):
            clock.now += 1 if epoch < 2 else 10
    assert capfd.readouterr().err.splitlines() == [
        "batches: 1/2 in 0:00:10, about 0:00:10 to go",
        "batches: 2/2 in 0:00:20",
        "epochs: 3/3 in 0:00:24",
    ]


def test_without_a_stderr_the_items_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(track(range(3), show=True)) == [0, 1, 2]


def on_terminal(code: str, *, stdout: int | None = None, **environ: str) -> str:
    """What a script shows on a terminal of 100 columns."""
    reader, writer = pty.openpty()
    variables = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", **environ}
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**kept, **variables},
        stdin=writer,
        stdout=writer if stdout is None else stdout,
        stderr=writer,
    ) as process:
        os.close(writer)
        pieces = []
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # Linux says so when the other side was closed
                break
            pieces.append(piece)
        os.close(reader)
        assert process.wait(timeout=60) == 0, pieces
    return b"".join(pieces).decode()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


SHOW_CURSOR = "\x1b[?25h"


def test_a_terminal_gets_a_bar() -> None:
    shown = on_terminal(
        """
        import time
        from torchweft.progress import track
        for item in track(range(40), "train [/x]", show=True):
            time.sleep(0.02)
            if item == 20:
                print("printed meanwhile")
        """
    )
    last = [line for line in plain(shown).replace("\r", "\n").split("\n") if "train" in line][-1]
    assert "train [/x]" in last
    assert "40/40" in last
    assert "━" in last
    # Between items, but not for each of them.
    counts = set(re.findall(r"(\d+)/40", plain(shown)))
    assert 3 <= len(counts) < 35
    assert "printed meanwhile" in shown
    assert shown.rindex(SHOW_CURSOR) > shown.rindex("━")


def test_a_bar_is_closed_however_the_loop_ends() -> None:
    shown = on_terminal(
        """
        import sys
        from torchweft.progress import track
        stdout = sys.stdout
        for item in track(range(9), show=True):
            assert sys.stdout is not stdout
            if item == 4:
                break
        assert sys.stdout is stdout
        try:
            for item in track(range(8), show=True):
                raise ValueError
        except ValueError:
            assert sys.stdout is stdout
        for item in track(iter("abc"), show=True):
            pass
        assert sys.stdout is stdout
        print("the end")
        """
    )
    assert "4/9" in shown
    assert "0/8" in shown
    assert "3/?" in shown
    assert shown.count(SHOW_CURSOR) == 3
    assert shown.rstrip().endswith("the end")


def test_bars_within_a_bar_are_one_display() -> None:
    shown = on_terminal(
        """
        from torchweft.progress import Bars
        bars = Bars()
        for epoch in bars.track(range(2), "epochs", show=True):
            for batch in bars.track(range(5), "batches", show=True):
                pass
        for again in bars.track("ab", "again", show=True):
            pass
        """
    )
    assert shown.count(SHOW_CURSOR) == 2
    lines = [
        line.split()[0] for line in plain(shown).replace("\r", "\n").split("\n") if "/" in line
    ]
    assert set(lines) == {"epochs", "batches", "again"}
    assert shown.index("batches") < shown.index("again")
    # What stays when everything has ended.
    assert lines[-1] == "again"


def test_what_is_printed_to_a_file_stays_there() -> None:
    reader, writer = os.pipe()
    shown = on_terminal(
        """
        from torchweft.progress import track
        for item in track("ab", "train", show=True):
            print(item)
        """,
        stdout=writer,
    )
    os.close(writer)
    with os.fdopen(reader) as file:
        assert file.read() == "a\nb\n"
    assert "2/2" in shown


def test_a_terminal_that_knows_no_cursor_gets_lines() -> None:
    shown = on_terminal(
        """
        from torchweft.progress import track
        list(track("ab", "train", show=True))
        """,
        TERM="dumb",
    )
    assert shown == "train: 2/2 in 0:00:00\r\n"


def test_no_thread_is_started() -> None:
    # A loader's workers are forked while the bar stands.
    shown = on_terminal(
        """
        import threading
        from torchweft.progress import track
        for item in track("ab", show=True):
            print(threading.active_count(), "thread")
        """
    )
    assert plain(shown).count("1 thread") == 2
