"""``torchweft logs``: what the loggers of a run wrote, as a table and as curves."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import click

from torchweft.cli import on_terminal, write_json
from torchweft.errors import InvalidRequest, NotAvailable, TorchweftError, did_you_mean
from torchweft.loggers.reading import Curve, Logs, read_logs

__all__ = ["logs"]

#: Metrics that are drawn in the terminal; the picture has all.
_DRAWN = 6


@click.command()
@click.argument(
    "run_folder", type=click.Path(exists=True, file_okay=False, readable=True, path_type=Path)
)
@click.option(
    "--metric",
    "wanted",
    multiple=True,
    metavar="NAME",
    help="Only this metric; may be given several times, and be a pattern such as 'train*'.",
)
@click.option(
    "--png",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the picture of the curves.  [default: RUN_FOLDER/metrics.png]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def logs(run_folder: Path, wanted: tuple[str, ...], png: Path | None, as_json: bool) -> None:
    """Show the metrics that CSVLogger and TensorBoardLogger wrote below RUN_FOLDER: a table of the
    last, the least and the greatest value of each, curves in the terminal, and a PNG of them.

    RUN_FOLDER may be that of one run or of many; runs are then drawn together.

    With --json one object is printed, and a picture is written only where --png says so. Values
    that are not finite are null:

    \b
    {"metrics": [{"run", "source", "metric", "count", "nonfinite",
                  "last", "last_step", "min", "min_step", "max", "max_step"}],
     "notes": ["what could not be read"], "png": "path or null"}
    """
    terminal = on_terminal() and not as_json
    if png is None and not as_json:
        png = run_folder / "metrics.png"
    # Before anything is printed.
    if png is not None:
        _need("matplotlib", "writes the picture")
    if terminal:
        _need("plotext", "draws curves in the terminal")
    found = _choose(read_logs(run_folder), wanted, run_folder)
    groups = _by_metric(found.curves)
    if png is not None:
        _write_png(groups, png)
    if as_json:
        write_json(_document(found, png))
        return
    for note in found.notes:
        click.secho(f"note: {note}", err=True, fg="yellow")
    rows = [_row(curve) for curve in found.curves]
    if terminal:
        _write_table(rows)
        for metric in list(groups)[:_DRAWN]:
            _draw(metric, groups[metric])
        if len(groups) > _DRAWN:
            click.echo(f"\n{len(groups) - _DRAWN} more metrics are in the picture; see --metric")
        click.echo()
    else:
        _write_plain(rows)
    click.echo(f"picture: {png}")


def _need(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NotAvailable(
            f"the package {package}, which {what}, is not installed; try: "
            'pip install "torchweft[logs]"'
        )


def _choose(found: Logs, wanted: tuple[str, ...], folder: Path) -> Logs:
    if not found.curves:
        noted = "".join(f"; {note}" for note in found.notes)
        raise InvalidRequest(
            f"there are no metrics below '{folder}': neither a metrics.csv of CSVLogger nor an "
            f"event file of TensorBoard with values in it{noted}; name the root_dir of a logger, "
            "or the folder of one of its runs"
        )
    known = list(dict.fromkeys(curve.metric for curve in found.curves))
    for name in wanted:
        if not any(fnmatchcase(metric, name) for metric in known):
            raise InvalidRequest(
                f"no metric below '{folder}' is called '{name}'{did_you_mean(name, known) or ';'} "
                f"there are: {', '.join(known)}"
            )
    if not wanted:
        return found
    curves = [c for c in found.curves if any(fnmatchcase(c.metric, name) for name in wanted)]
    return Logs(curves=curves, notes=found.notes)


def _by_metric(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.metric, []).append(curve)
    return groups


def _labels(curves: Sequence[Curve]) -> list[str]:
    """What tells the curves of one metric apart."""
    several = len({curve.source for curve in curves}) > 1
    return [f"{curve.run} ({curve.source})" if several else curve.run for curve in curves]


# -- the table -----------------------------------------------------------------------------------

_HEADINGS = ("Run", "From", "Metric", "Last", "Min", "Max", "Values", "Note")


def _row(curve: Curve) -> tuple[str, ...]:
    strange = f"{curve.nonfinite} not finite" if curve.nonfinite else ""
    return (
        curve.run,
        curve.source,
        curve.metric,
        _at(curve, len(curve.values) - 1),
        _at(curve, curve.lowest()),
        _at(curve, curve.highest()),
        str(len(curve.values)),
        strange,
    )


def _at(curve: Curve, index: int | None) -> str:
    if index is None:
        return "none"
    return f"{curve.values[index]:.5g} @ {curve.steps[index]}"


def _write_plain(rows: list[tuple[str, ...]]) -> None:
    table = [tuple(heading.upper() for heading in _HEADINGS), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(_HEADINGS))]
    for row in table:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def _write_table(rows: list[tuple[str, ...]]) -> None:
    # A pipe does not need rich, and does not wait for its import.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    # A column in which all rows say the same says nothing.
    shown = [i for i in range(len(_HEADINGS)) if i > 1 or len({row[i] for row in rows}) > 1]
    shown = [i for i in shown if any(row[i] for row in rows)]
    for i in shown:
        table.add_column(_HEADINGS[i], overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in shown))
    plain = click.get_current_context().color is False
    Console(highlight=False, color_system=None if plain else "auto").print(table)


def _document(found: Logs, png: Path | None) -> Mapping[str, object]:
    return {
        "metrics": [_record(curve) for curve in found.curves],
        "notes": found.notes,
        "png": None if png is None else str(png),
    }


def _record(curve: Curve) -> dict[str, object]:
    record: dict[str, object] = {
        "run": curve.run,
        "source": curve.source,
        "metric": curve.metric,
        "count": len(curve.values),
        "nonfinite": curve.nonfinite,
    }
    places = {"last": len(curve.values) - 1, "min": curve.lowest(), "max": curve.highest()}
    for name, index in places.items():
        value = math.nan if index is None else curve.values[index]
        record[name] = value if math.isfinite(value) else None
        record[f"{name}_step"] = None if index is None else curve.steps[index]
    return record


# -- the curves ----------------------------------------------------------------------------------


def _draw(metric: str, curves: Sequence[Curve]) -> None:
    from plotext import figure

    width = min(shutil.get_terminal_size().columns, 100)
    figure.clear()
    figure.theme("simple")
    figure.plot_size(width, 14)
    figure.title(metric)
    for curve, label in zip(curves, _labels(curves), strict=True):
        points = [
            point
            for point in zip(curve.steps, curve.values, strict=True)
            if math.isfinite(point[1])
        ]
        if points:
            line = figure.signal(*map(list, zip(*points, strict=True)), marker="braille")
            line.lines()
            if len(curves) > 1:
                line.label(label)
            figure.draw(line)
    drawn: str = figure.build().string(colorless=click.get_current_context().color is False)
    click.echo(f"\n{drawn.rstrip()}")


def _write_png(groups: Mapping[str, Sequence[Curve]], path: Path) -> None:
    # Not pyplot, which looks for a display and keeps every figure.
    from matplotlib.figure import Figure

    across = min(len(groups), 2)
    down = math.ceil(len(groups) / across)
    figure = Figure(figsize=(6.4 * across, 3.6 * down), layout="constrained")
    places = figure.subplots(down, across, squeeze=False).flat
    for place in list(places)[len(groups) :]:
        place.set_axis_off()
    for place, (metric, curves) in zip(places, groups.items(), strict=False):
        for curve, label in zip(curves, _labels(curves), strict=True):
            # A single point has no line.
            place.plot(
                curve.steps,
                curve.values,
                # A leading underscore would hide it.
                label=f" {_literal(label)}",
                marker="o" if len(curve.values) == 1 else None,
            )
        place.set_title(_literal(metric))
        place.set_xlabel("step")
        place.grid(alpha=0.3)
        if len(curves) > 1:
            place.legend(fontsize="small")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise TorchweftError(
            f"cannot write the picture to '{path}': {error.strerror or error}; name another "
            "place with --png"
        ) from error


def _literal(text: str) -> str:
    # A dollar begins a formula.
    return text.replace("$", r"\$")
