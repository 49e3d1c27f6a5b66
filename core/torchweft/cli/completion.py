"""Completion on the shell: the script for it, and the names that can be chosen here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["completion", "name_option"]


def name_option(kind: str, **attributes: Any) -> Callable[..., Any]:
    """An option ``--kind`` that takes a name of that kind; shells complete those known here."""

    def complete(
        ctx: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from torchweft.catalog import Catalog
        from torchweft.manager import Manager

        catalog = Catalog(Manager.from_entry_points(os.environ).declared)
        summaries = {
            name: entry.spec.summary
            for entry in catalog.entries(kind)
            for name in sorted(entry.spec.names())
        }
        return [
            CompletionItem(name, help=summary or None)
            for name, summary in {"auto": "", **summaries}.items()
            if name.startswith(incomplete)
        ]

    return click.option(f"--{kind}", shell_complete=complete, **attributes)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "fish", "zsh"]))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete torchweft's commands, flags and names.

    \b
    bash:  eval "$(torchweft completion bash)"    in ~/.bashrc
    zsh:   eval "$(torchweft completion zsh)"     in ~/.zshrc
    fish:  torchweft completion fish > ~/.config/fish/completions/torchweft.fish
    """
    from click.shell_completion import get_completion_class

    cls = get_completion_class(shell)
    if cls is None:  # click supports all three
        raise click.UsageError(f"no completion for {shell}")
    root = click.get_current_context().find_root().command
    # bash is asked for its version, which has to be there to be asked.
    click.echo(cls(root, {}, "torchweft", "_TORCHWEFT_COMPLETE").source())
