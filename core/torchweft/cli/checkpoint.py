"""``torchweft checkpoint``: look into checkpoints, and write them in another form."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from torchweft.cli import on_terminal, write_json, write_rows

__all__ = ["checkpoint"]


@click.group()
def checkpoint() -> None:
    """Look into a checkpoint, a file or a folder, or write it in another form."""


@checkpoint.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", "each", is_flag=True, help="Also every tensor: name, shape, dtype.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def inspect(path: Path, each: bool, as_json: bool) -> None:
    """Show what the checkpoint PATH holds: models, optimizers, values, and what wrote it.

    Tensors are not read, and no code from the checkpoint is run. A tied weight, which is stored
    once, counts once; "names" counts each of its names.

    \b
    {"path", "form": "file or folder", "bytes", "torchweft", "torch",
     "world_size", "strategy", "precision", "format",
     "parts": [{"key", "kind": "model, optimizer, tensors or value",
                "count", "names", "elements", "bytes", "dtypes",
                "tensors": [{"name", "shape", "dtype"}],
                "groups", "lr", "state", "value", "layout"}]}
    """
    # Not above: it imports torch, which the help need not wait for.
    from torchweft.checkpoint.describing import describe

    found = describe(path)
    if as_json:
        write_json(found)
        return
    write_rows(_head(found), width=11)
    click.echo()
    _write_table(_PARTS, [_summary(part) for part in found["parts"]])
    if each:
        for part in found["parts"]:
            rows = [_tensor(part["key"], tensor) for tensor in part.get("tensors", ())]
            if rows:
                click.echo()
                _write_table(_TENSORS, rows)


@checkpoint.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write; a name that ends in .safetensors gets one model's weights alone.  "
    "[default: PATH.ckpt]",
)
@click.option("--key", help="The model, where the weights of one are written.  [default: model]")
def consolidate(path: Path, output: Path | None, key: str | None) -> None:
    """Write the checkpoint folder PATH as one file, the one that `fabric.save` writes to a path
    with a suffix. One process does it, whatever number wrote the folder.

    With --output NAME.safetensors, PATH may also be a checkpoint of one file.
    """
    from torchweft.checkpoint.consolidating import consolidate as write

    path = Path(*path.parts)
    output = output or path.with_name(f"{path.name}.ckpt")
    for note in write(path, output, key):
        click.secho(f"note: {note}", err=True, fg="yellow")
    click.echo(f"wrote {output}, {_size(output.stat().st_size)}")


# -- the words -----------------------------------------------------------------------------------

_PARTS = ("Key", "Kind", "Tensors", "Elements", "Size", "Dtypes", "Value")
_TENSORS = ("Tensor", "Shape", "Dtype")


def _head(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("checkpoint", f"{found['path']}, a {found['form']} of {_size(found['bytes'])}")]
    if found["torchweft"] is not None:
        processes = "1 process" if found["world_size"] == 1 else f"{found['world_size']} processes"
        rows.append(("written by", f"torchweft {found['torchweft']}, torch {found['torch']}"))
        rows.append(("on", f"{processes}, {found['strategy']}, {found['precision']}"))
    return rows


def _summary(part: Mapping[str, Any]) -> tuple[str, ...]:
    key = part["key"] or "(all of it)"
    if part["kind"] == "value" or "layout" in part:
        value = _short(str(part["value"])) if part["kind"] == "value" else part["value"]
        return (key, part["kind"], "", "", "", "", value)
    dtypes = ", ".join(
        name if len(part["dtypes"]) == 1 else f"{count} {name}"
        for name, count in part["dtypes"].items()
    )
    value = ""
    if part["kind"] == "optimizer":
        groups = "1 group" if part["groups"] == 1 else f"{part['groups']} groups"
        rates = ", ".join(f"{rate:.4g}" for rate in dict.fromkeys(part["lr"]))
        value = f"{groups}, lr {rates}" if rates else groups
        if part["state"]:
            value += f"; {', '.join(part['state'])}"
    elif part["names"] > part["count"]:
        value = f"{part['names']} names"
    size = _size(part["bytes"])
    return (key, part["kind"], str(part["count"]), f"{part['elements']:,}", size, dtypes, value)


def _tensor(key: str, tensor: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"{key}: {tensor['name']}" if key else tensor["name"]
    return (name, str(tuple(tensor["shape"])), tensor["dtype"])


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# -- tables --------------------------------------------------------------------------------------


def _write_table(headings: Sequence[str], rows: list[tuple[str, ...]]) -> None:
    if on_terminal():
        _write_rich(headings, rows)
        return
    table = [tuple(heading.upper() for heading in headings), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(headings))]
    for row in table:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def _write_rich(headings: Sequence[str], rows: list[tuple[str, ...]]) -> None:
    # A pipe does not need rich, and does not wait for its import.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    # A column in which nothing is says nothing.
    shown = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    for i in shown:
        table.add_column(headings[i], overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in shown))
    plain = click.get_current_context().color is False
    width = max(shutil.get_terminal_size().columns, 60)
    console = Console(highlight=False, color_system=None if plain else "auto", width=width)
    console.print(table)
