"""What all benchmarks say about themselves: machine, versions, a table, a JSON file, a plot."""

import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles


def installed(distribution: str) -> str | None:
    """The version of a distribution in this environment, None where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def circumstances() -> dict[str, object]:
    """Date, machine and versions: what a figure means nothing without."""
    distributions = ("torch", "torchweft", "torchweft-cuda", "lightning", "accelerate")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: found for name in distributions if (found := installed(name))},
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "low": low, "high": high}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    )


def write(path: str | None, content: dict[str, object]) -> None:
    """Write the figures as JSON, where a path was given."""
    if path:
        Path(path).write_text(json.dumps(content, indent=2) + "\n")


def bars(path: str, panels: dict[str, dict[str, dict[str, float]]]) -> None:
    """Draw groups of bars, one colour per name, above each axis's label; needs matplotlib."""
    # Imported here, because the figures need none of it.
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(n for groups in panels.values() for g in groups.values() for n in g))
    width = 0.8 / len(names)
    longest = max(map(len, panels.values()))
    size = (max(6.0, 0.35 * len(names) * longest) * len(panels), 4.5)
    figure = Figure(figsize=size, layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, groups) in zip(drawn, panels.items(), strict=True):
        for index, name in enumerate(names):
            places = [place for place, group in enumerate(groups.values()) if name in group]
            heights = [group[name] for group in groups.values() if name in group]
            axes.bar([place + index * width for place in places], heights, width, label=name)
        axes.set_xticks([place + 0.4 - width / 2 for place in range(len(groups))], list(groups))
        axes.set_ylabel(label)
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 3))
    figure.savefig(path)
