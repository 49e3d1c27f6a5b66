"""The group: lazy subcommands, errors as one line, exit statuses, aligned rows."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable

import click
import pytest

import torchweft
from torchweft.cli import main, write_rows
from torchweft.errors import InvalidRequest, NotAvailable, RankFailed, UnknownOption


def command(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHWEFT_")}
    return subprocess.run(
        [sys.executable, "-m", "torchweft", *args],
        env={**kept, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def imported_by(*args: str) -> set[str]:
    """The modules that are there when the command ends, in a fresh interpreter."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from torchweft.cli import main\n"
        f"main({list(args)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Puts a command that raises in the place of ``torchweft run``."""

    def put(error: BaseException) -> None:
        @click.command()
        def run() -> None:
            raise error

        module = types.ModuleType("torchweft.cli.run")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchweft.cli.run", module)

    return put


def status(*args: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return ended.value.code


def test_version() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"torchweft {torchweft.__version__}\n")


def test_the_help_lists_the_commands() -> None:
    done = command("--help")
    assert done.returncode == 0
    for line in (
        "run         Run a training script on one or many processes.",
        "plan        Show what would be decided for a run, and why.",
        "plugins     List everything that can be chosen by name.",
        "checkpoint  Look into a checkpoint, or write it in another form.",
        "completion  Print the shell's completion script.",
        "new         Write a package to start a backend from.",
        "doctor      Look for what is wrong on this computer.",
    ):
        assert line in done.stdout


@pytest.mark.parametrize("name", ["run", "plan", "plugins", "checkpoint", "new", "doctor"])
def test_every_command_has_a_help(name: str) -> None:
    done = command(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: torchweft {name} ")


def test_the_help_imports_no_command() -> None:
    imported = imported_by("--help")
    assert not {name for name in imported if name.startswith("torchweft.cli.")}
    assert not {"torch", "rich", "torchweft.manager"} & imported


@pytest.mark.parametrize("name", ["run", "plan", "plugins", "checkpoint", "new", "doctor"])
def test_a_command_imports_no_other_and_no_torch_for_its_help(name: str) -> None:
    imported = imported_by(name, "--help")
    commands = {"run", "plan", "plugins", "checkpoint", "new", "doctor"}
    assert {c for c in commands if f"torchweft.cli.{c}" in imported} == {name}
    assert not {"torch", "rich"} & imported


def test_an_unknown_command_names_the_nearest() -> None:
    done = command("plugin")
    assert done.returncode == 2
    assert (
        "no command is called 'plugin'; did you mean 'plugins'? known: run, slurm, plan, plugins, "
        "logs, checkpoint, completion, new, doctor"
    ) in done.stderr


def test_an_unknown_option_is_not_taken_for_a_command() -> None:
    done = command("--nonsense")
    assert done.returncode == 2
    assert "No such option" in done.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequest("devices=0 asks for 0 devices"), 2),
        (UnknownOption("no option 'x'"), 2),
        (NotAvailable("no driver"), 1),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: Exception, expected: int, stand_in: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    stand_in(error)
    assert status("run") == expected
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_an_error_of_several_lines_becomes_one(
    stand_in: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    stand_in(NotAvailable("cannot open libx.so:\n  no such file\n"))
    assert status("run") == 1
    assert capsys.readouterr().err == "error: cannot open libx.so: no such file\n"


def test_a_failed_rank_gives_its_status_and_its_own_words(
    stand_in: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    stand_in(RankFailed("rank 3 ended:\n\nTraceback …", rank=3, exit_status=137))
    assert status("run") == 137
    assert capsys.readouterr().err == "rank 3 ended:\n\nTraceback …\n"


def test_the_traceback_is_shown_when_asked_for(
    stand_in: Callable[..., None],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHWEFT_TRACE", "1")
    stand_in(NotAvailable("no driver"))
    assert status("run") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.endswith("error: no driver\n")


def test_an_error_that_is_not_ours_is_not_hidden(stand_in: Callable[..., None]) -> None:
    stand_in(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["run"])


def test_a_terminal_that_knows_no_colours_is_sent_none(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    @click.pass_context
    def run(ctx: click.Context) -> None:
        click.echo(f"color={ctx.color}")

    module = types.ModuleType("torchweft.cli.run")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchweft.cli.run", module)
    for variable, value, expected in [
        ("NO_COLOR", "1", "False"),
        ("NO_COLOR", "", "None"),
        ("TERM", "dumb", "False"),
        ("TERM", "xterm", "None"),
    ]:
        with monkeypatch.context() as patch:
            patch.delenv("NO_COLOR", raising=False)
            patch.setenv("TERM", "xterm")
            patch.setenv(variable, value)
            assert status("run") == 0
        assert capsys.readouterr().out == f"color={expected}\n"


@pytest.mark.parametrize("name", ["plan", "plugins"])
def test_a_closed_output_is_not_an_error(name: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "{sys.executable}" -m torchweft {name} >&-'],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_rows_in_a_pipe_are_lines(capsys: pytest.CaptureFixture) -> None:
    text = "word " * 50
    write_rows([("label", text), ("", "  indented")], width=8)
    assert capsys.readouterr().out == f"label   {text}\n{'':8}  indented\n"


@pytest.mark.parametrize("columns", [80, 140])
def test_rows_on_a_terminal_are_wrapped_in_their_column(
    columns: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    words = [f"word-{i}" for i in range(40)]
    write_rows([("label", "  " + " ".join(words))], width=8)
    shown = click.unstyle(capsys.readouterr().out)
    lines = shown.splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= columns
    assert lines[0].startswith("label     word-0 ")
    # Further lines hang below the first.
    assert all(line.startswith(" " * 12 + "word-") for line in lines[1:])
    assert shown.split()[1:] == words
