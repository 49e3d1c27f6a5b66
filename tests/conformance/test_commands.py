"""Commands under test: what they print, what they leave behind, and what a hang shows."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from torchweft.testing.commands import Command, clean_environment, listens, marked


def start(code: str) -> Command:
    command = [sys.executable, "-c", code]
    return Command(command, clean_environment({"SAID": "yes"}), subprocess.PIPE, None)


def test_what_it_is_given_and_how_it_ends() -> None:
    command = start("import os, sys; print(os.environ['SAID'], len(sys.stdin.read())); sys.exit(3)")
    result = command.finish(30, "typed\n" * 100_000)
    assert (result.status, result.lines, result.err) == (3, ["yes 600000"], "")
    assert command.left() == []


def test_a_hang_shows_what_was_printed_and_where_it_stands() -> None:
    command = start("import time\nprint('said', flush=True)\ntime.sleep(600)")
    with pytest.raises(TimeoutError, match=r"^no end within 1 s\n--- out\nsaid\n") as hung:
        command.finish(1)
    assert 'File "<string>", line 3 in <module>' in str(hung.value)
    assert marked(command.mark) == []


def test_nothing_of_this_test_makes_a_rank_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT", "TORCHWEFT_LAUNCHER", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "1")
    environ = clean_environment({"RANK": "7"})
    assert environ["RANK"] == "7"
    assert environ["KEPT"] == "1"
    assert {"MASTER_PORT", "TORCHWEFT_LAUNCHER", "TORCHELASTIC_RUN_ID"}.isdisjoint(environ)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_who_listens_is_seen(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, 0), family=family)
    except OSError as error:
        pytest.skip(f"this computer has no {address}: {error}")
    with server:
        port = server.getsockname()[1]
        assert listens(port)
    assert not listens(port)
