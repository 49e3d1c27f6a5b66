"""Reading back what loggers wrote below a folder."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchweft.errors import NotAvailable

__all__ = ["Curve", "Logs", "read_logs"]

_TABLE = "metrics.csv"
_EVENTS = "events.out.tfevents."
_CUT = "{} ends within an event, or is damaged; what is behind that place was left out"


@dataclass(slots=True, kw_only=True)
class Curve:
    """One metric of one run.

    Attributes:
        run: the folder that the values were found in, below the one that was read.
        source: ``"csv"`` or ``"tensorboard"``.
        metric: its name.
        steps: growing.
        values: one for each step; they may be infinite or not a number.
    """

    run: str
    source: str
    metric: str
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Add a value; those of the same step and later ones are replaced by it.

        A run that went back to a checkpoint records steps again, and what it had recorded after
        that checkpoint belongs to nothing that there is.
        """
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(value)

    def lowest(self) -> int | None:
        """Index of the smallest finite value; None where none is finite."""
        return min(self._finite(), key=self.values.__getitem__, default=None)

    def highest(self) -> int | None:
        """Index of the greatest finite value; None where none is finite."""
        return max(self._finite(), key=self.values.__getitem__, default=None)

    @property
    def nonfinite(self) -> int:
        """How many values are infinite or not a number."""
        return len(self.values) - len(self._finite())

    def _finite(self) -> list[int]:
        return [i for i, value in enumerate(self.values) if math.isfinite(value)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """What was found below a folder.

    Attributes:
        curves: by run, then in the order in which the metrics appeared.
        notes: sentences on what could not be read.
    """

    curves: list[Curve]
    notes: list[str]


def read_logs(folder: Path) -> Logs:
    """Every ``metrics.csv`` of ``CSVLogger`` and every event file of TensorBoard below a folder.

    The part of a line, or of an event, with which a file of a run that goes on or was killed may
    end is left out. Event files in one folder are one run, as in TensorBoard.

    Raises:
        NotAvailable: when there are event files, and TensorBoard is not installed.
    """
    curves: list[Curve] = []
    notes: list[str] = []
    for found, names in _folders(folder):
        run = found.relative_to(folder).as_posix()
        if _TABLE in names:
            curves += _read_table(found / _TABLE, run, notes)
        events = sorted(name for name in names if name.startswith(_EVENTS))
        if events:
            curves += _read_events(found, run, notes)
            notes += [_CUT.format(found / name) for name in events if _is_cut(found / name)]
    return Logs(curves=curves, notes=notes)


def _folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    for here, below, names in os.walk(folder):
        below.sort(key=_in_order)
        yield Path(here), names


def _in_order(name: str) -> tuple[str, int, str]:
    """``version_2`` before ``version_10``."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or -1), name


def _read_table(path: Path, run: str, notes: list[str]) -> list[Curve]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        notes.append(f"{path} cannot be read: {error}")
        return []
    whole, _, rest = text.rpartition("\n")
    if rest:
        notes.append(f"{path} ends within a line, which was left out")
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    columns = list(reader.fieldnames or [])
    if not columns:
        return []
    if "step" not in columns:
        notes.append(f"{path} has no column 'step', so that it is no table of a logger")
        return []
    curves = {name: Curve(run=run, source="csv", metric=name) for name in columns if name != "step"}
    strange: set[str] = set()
    for row in reader:
        try:
            step = int(float(row["step"] or ""))
        except (ValueError, OverflowError):
            strange.add("step")
            continue
        for name, curve in curves.items():
            if row[name]:
                try:
                    curve.add(step, float(row[name]))
                except ValueError:
                    strange.add(name)
    for name in sorted(strange):
        notes.append(f"{path}, column '{name}': cells that are no numbers were left out")
    return [curve for curve in curves.values() if curve.values]


def _read_events(folder: Path, run: str, notes: list[str]) -> list[Curve]:
    if importlib.util.find_spec("tensorboard") is None:
        raise NotAvailable(
            f"{folder} holds event files of TensorBoard, and the package tensorboard, which reads "
            'them, is not installed; try: pip install "torchweft[logs]"'
        )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Every event: by default it draws a sample.
    events: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    try:
        events.Reload()
    except Exception as error:  # whatever its readers make of what is no event file
        notes.append(f"the event files in {folder} cannot be read: {error}")
        return []
    curves = []
    for metric in events.Tags()["scalars"]:
        curve = Curve(run=run, source="tensorboard", metric=metric)
        for event in events.Scalars(metric):
            curve.add(event.step, event.value)
        curves.append(curve)
    return curves


def _is_cut(path: Path) -> bool:
    """Whether the last event is not whole, which TensorBoard's readers pass over in silence."""
    size, place = path.stat().st_size, 0
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            # Each event: its length in 8 bytes, their checksum in 4, itself, its checksum in 4.
            place += int.from_bytes(file.read(8), "little") + 16
    return place != size
