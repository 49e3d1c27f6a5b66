"""``torchweft plugins``: everything that can be chosen by name, and who provides it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import click

from torchweft.catalog import Catalog, Row
from torchweft.cli import on_terminal, write_json
from torchweft.manager import Declared, Manager
from torchweft.specs import KINDS

__all__ = ["plugins"]

_HEADINGS = {
    "accelerator": "Accelerators",
    "strategy": "Strategies",
    "precision": "Precisions",
    "launcher": "Launchers",
    "plugin": "Plugins",
}

_CLASH_HINT = (
    "uninstall one of them, or set TORCHWEFT_DISABLE_PLUGINS to the plugin that you do not want"
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def plugins(as_json: bool) -> None:
    """List accelerators, strategies, precisions and launchers: every name, who provides it, and
    whether it can be used here.

    In a pipe each entry is one line. With --json one object is printed:

    \b
    {"plugins": [{"name", "distribution", "version", "error", "disabled"}],
     "rows": [{"kind", "name", "aliases", "provider", "summary",
               "available", "reason", "hint", "clash"}]}

    "error" is empty for a plugin that works; "disabled" is true for one that
    TORCHWEFT_DISABLE_PLUGINS names, and whose names are not in "rows". "reason" and "hint" say why
    an entry is not available and what to do; "clash" is empty for a name that one plugin alone
    declares.

    TORCHWEFT_TRACE=1 prints the traceback of every plugin that failed to load.
    """
    declared = Manager.from_entry_points(os.environ).declared
    rows = Catalog(declared).rows()
    if os.environ.get("TORCHWEFT_TRACE") == "1":
        for plugin in declared:
            click.echo(plugin.trace, err=True, nl=False)
    if as_json:
        write_json(_document(declared, rows))
    elif on_terminal():
        _write_table(_lines(declared, rows))
    else:
        _write_plain(_lines(declared, rows))


def _document(declared: Iterable[Declared], rows: Iterable[Row]) -> dict[str, object]:
    return {
        "plugins": [
            {
                "name": plugin.plugin,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "error": plugin.error,
                "disabled": plugin.disabled,
            }
            for plugin in declared
        ],
        "rows": [asdict(row) for row in rows],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """One entry of the listing; ``notes`` are (sentence, colour), in the order of reading."""

    kind: str
    name: str
    here: str
    provider: str
    notes: tuple[tuple[str, str], ...]


def _lines(declared: Iterable[Declared], rows: Iterable[Row]) -> list[_Line]:
    return [*map(_row_line, rows), *map(_plugin_line, declared)]


def _row_line(row: Row) -> _Line:
    here = "yes" if row.available else "no"
    return _Line(
        kind=row.kind,
        name=row.name,
        here="clash" if row.clash else here,
        provider=row.provider,
        notes=_notes(
            ("", row.summary, ""),
            ("also: ", ", ".join(row.aliases), ""),
            ("note: " if row.available else "why not: ", row.reason, "yellow"),
            ("what to do: ", row.hint, "cyan"),
            ("clash: ", row.clash, "red"),
            ("what to do: ", _CLASH_HINT if row.clash else "", "cyan"),
        ),
    )


def _plugin_line(plugin: Declared) -> _Line:
    counts = Counter(spec.kind for spec in plugin.specs)
    declares = ", ".join(
        f"{counts[kind]} {kind if counts[kind] == 1 else _HEADINGS[kind].lower()}"
        for kind in KINDS
        if counts[kind]
    )
    way_out = (
        f"upgrade or uninstall {plugin.distribution}, or set "
        f"TORCHWEFT_DISABLE_PLUGINS={plugin.plugin}"
    )
    broken = (("failed to load: ", plugin.error, "red"), ("what to do: ", way_out, "cyan"))
    working = (("declares ", declares or "nothing to choose, hooks only", ""),)
    disabled = (("", "disabled by TORCHWEFT_DISABLE_PLUGINS", ""),)
    here, notes = ("broken", broken) if plugin.error else ("yes", working)
    return _Line(
        kind="plugin",
        name=plugin.plugin,
        here="off" if plugin.disabled else here,
        provider=plugin.provider,
        notes=_notes(*(disabled if plugin.disabled else notes)),
    )


def _notes(*notes: tuple[str, str, str]) -> tuple[tuple[str, str], ...]:
    """(label, sentence, colour) as (labelled sentence, colour), without the empty ones."""
    return tuple(
        (label + " ".join(sentence.split()), colour)
        for label, sentence, colour in notes
        if sentence.strip()
    )


def _write_plain(lines: list[_Line]) -> None:
    table = [("KIND", "NAME", "HERE", "PROVIDED BY", "ABOUT")]
    for line in lines:
        about = "; ".join(sentence for sentence, _ in line.notes)
        table.append((line.kind, line.name, line.here, line.provider, about))
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    for row in table:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[4]]).rstrip())


def _write_table(lines: list[_Line]) -> None:
    # A pipe does not need rich, and does not wait for its import.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {
        "yes": "green",
        "no": "yellow",
        "off": "yellow",
        "clash": "bold red",
        "broken": "bold red",
    }
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
        header_style="dim",
    )
    for heading in ("Name", "Here", "Provided by"):
        table.add_column(heading, overflow="fold")
    table.add_column("About", overflow="fold", ratio=1)
    for kind, heading in _HEADINGS.items():
        mine = [line for line in lines if line.kind == kind]
        if table.row_count:
            table.add_row()
        table.add_row(Text(heading, style="bold"))
        if not mine:
            table.add_row(Text("none", style="dim"))
        for line in mine:
            about = Text("\n").join(Text(sentence, style=c) for sentence, c in line.notes)
            here = Text(line.here, style=colours[line.here])
            table.add_row(Text(line.name), here, Text(line.provider), about)
    plain = click.get_current_context().color is False
    Console(highlight=False, color_system=None if plain else "auto").print(table)
