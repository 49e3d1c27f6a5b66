"""The command ``torchweft``. A subcommand is imported only when it was asked for."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import click

from torchweft import __version__
from torchweft.errors import InvalidRequest, RankFailed, TorchweftError, did_you_mean

__all__ = ["main", "on_terminal", "write_json", "write_rows"]

#: Name -> where the command is, and the line that ``torchweft --help`` shows without importing it.
_COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("torchweft.cli.run:run", "Run a training script on one or many processes."),
    "slurm": ("torchweft.cli.slurm:slurm", "Print or submit a batch script for SLURM."),
    "plan": ("torchweft.cli.plan:plan", "Show what would be decided for a run, and why."),
    "plugins": ("torchweft.cli.plugins:plugins", "List everything that can be chosen by name."),
    "logs": ("torchweft.cli.logs:logs", "Show what the loggers of a run wrote."),
    "checkpoint": (
        "torchweft.cli.checkpoint:checkpoint",
        "Look into a checkpoint, or write it in another form.",
    ),
    "completion": ("torchweft.cli.completion:completion", "Print the shell's completion script."),
    "new": ("torchweft.cli.new:new", "Write a package to start a backend from."),
    "doctor": ("torchweft.cli.doctor:doctor", "Look for what is wrong on this computer."),
}


class _Commands(click.Group):
    """The table above, and how an error of torchweft ends a command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        # What looks like an option is click's to complain about.
        if name not in _COMMANDS and not name.startswith("-"):
            near = did_you_mean(name, _COMMANDS) or ";"
            ctx.fail(f"no command is called '{name}'{near} known: {', '.join(_COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            ctx.color = False
        try:
            return super().invoke(ctx)
        except TorchweftError as error:
            if os.environ.get("TORCHWEFT_TRACE") == "1":
                traceback.print_exception(error)
            click.echo(_message(error), err=True)
            ctx.exit(_status(error))


@click.group(cls=_Commands)
@click.version_option(__version__, message="%(prog)s %(version)s")
def _torchweft() -> None:
    """Scale a plain PyTorch training loop to any device, strategy and number of processes.

    Environment:

    \b
      TORCHWEFT_DISABLE_PLUGINS=a,b  Leave plugins out.
      TORCHWEFT_LAUNCHER=NAME        Choose who makes the processes.
      TORCHWEFT_TRACE=1              Print every hook call, and the traceback
                                     of an error.
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command with ``args`` (those of the process when None) and exit with its status.

    An error of torchweft is one line on stderr and the status 2 when what was asked for cannot
    mean anything, 1 otherwise; a rank that failed gives the status of the run.
    """
    _torchweft.main(args, prog_name="torchweft")
    raise SystemExit(0)  # click exits by itself


def on_terminal() -> bool:
    """Whether a person reads the output; False when it is closed."""
    return sys.stdout is not None and sys.stdout.isatty()


def write_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object, indented, as UTF-8 text whatever the terminal's language."""
    click.echo(json.dumps(document, indent=2))


def write_rows(rows: Iterable[tuple[str, str]], *, width: int) -> None:
    """Print ``(label, text)`` rows with the texts aligned, ``width`` columns to their left.

    On a terminal a long text is wrapped within its column; in a pipe a row is a line, so that
    tools which read lines see whole sentences. Indentation at the start of a text is kept.
    """
    terminal = on_terminal()
    columns = max(shutil.get_terminal_size().columns, width + 20)
    for label, text in rows:
        lines = [text]
        if terminal:
            indent = text[: len(text) - len(text.lstrip())]
            lines = textwrap.wrap(
                text.lstrip(),
                columns - width,
                initial_indent=indent,
                subsequent_indent=indent + "  ",
                break_on_hyphens=False,
            ) or [""]
        for line in lines:
            click.echo(f"{click.style(label, bold=True)}{' ' * (width - len(label))}{line}")
            label = ""


def _message(error: TorchweftError) -> str:
    # What a rank said is its own text, with the traceback; ours is one line, whatever is in it.
    if isinstance(error, RankFailed):
        return str(error)
    return "error: " + " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _status(error: TorchweftError) -> int:
    if isinstance(error, RankFailed):
        return error.exit_status
    return 2 if isinstance(error, InvalidRequest) else 1
