"""Metrics of a run as a table of comma-separated values."""

from __future__ import annotations

import csv
import io
import json
import os
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from torchweft.errors import InvalidRequest
from torchweft.loggers.folder import FolderLogger

__all__ = ["CSVLogger"]

_FILE = "metrics.csv"
_HYPERPARAMS = "hparams.json"

#: Rows older than this many seconds are written with the next one, for whoever watches a slow run.
_LONGEST_WAIT = 30.0


class CSVLogger(FolderLogger):
    """Writes ``metrics.csv`` and ``hparams.json`` to ``root_dir/name/version_N``.

    The table has one row for each call, with the column ``step`` first and then one column for each
    metric, in the order in which they appeared; a cell is empty where a call had no such metric. A
    metric that appears later becomes a new column: the file is then written anew and takes the
    place of the old one at once. What is left by a crash is whole rows.

    Args:
        root_dir: the folder of all experiments.
        name: the experiment; None or empty: runs lie in ``root_dir`` itself.
        version: the run: a number N is the folder ``version_N``, a text the folder of that name,
            and rows are added to those that are there. None: the next number that is free, picked
            with the first row.
        prefix: put before the name of every metric, with a ``-`` between.
        flush_logs_every_n_steps: rows that are kept in memory before they are written; at the end
            of the process all are. A row also waits for 30 seconds at most while others follow.
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        name: str | None = "torchweft_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(root_dir, name, version, prefix)
        if flush_logs_every_n_steps < 1:
            raise InvalidRequest(
                f"CSVLogger(flush_logs_every_n_steps={flush_logs_every_n_steps}) is not a number "
                "of rows; 1 writes each row at once"
            )
        self._every = flush_logs_every_n_steps
        self._table: _Table | None = None

    def _write(self, metrics: dict[str, float], step: int) -> None:
        if "step" in metrics:
            raise InvalidRequest(
                "a metric is called 'step', which is the column of the step; pass it as step=, or "
                "call it otherwise"
            )
        if self._table is None or self._table.process != os.getpid():
            self._table = _Table(os.path.join(self.log_dir, _FILE))
            # Also where nobody ends the run: at the end of the process, or of this object.
            weakref.finalize(self, self._table.flush)
        self._table.add({"step": step, **metrics}, self._every)

    def _write_hyperparams(
        self, params: Mapping[str, Any], metrics: dict[str, float], step: int
    ) -> None:
        text = json.dumps(_plain(params), indent=2)
        os.makedirs(self.log_dir, exist_ok=True)
        _replace(os.path.join(self.log_dir, _HYPERPARAMS), f"{text}\n")
        if metrics:
            self._write(metrics, step)

    def save(self) -> None:
        """Write the rows that are kept in memory."""
        if self._table is not None:
            self._table.flush()

    def __getstate__(self) -> dict[str, Any]:
        # Rows that are kept in memory are written by the process that was given them.
        return {**self.__dict__, "_table": None}


class _Table:
    """The file, and the rows that are not in it yet; belongs to one process."""

    def __init__(self, path: str) -> None:
        self.process = os.getpid()
        self._path = path
        self._waiting: list[Mapping[str, float]] = []
        self._waiting_since = 0.0
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._columns = _columns_of(path)
        # Rows that wait when a process forks would be written by both, or by neither.
        os.register_at_fork(before=_weakly(self))

    def add(self, row: Mapping[str, float], every: int) -> None:
        now = time.monotonic()
        if not self._waiting:
            self._waiting_since = now
        self._waiting.append(row)
        if len(self._waiting) >= every or now - self._waiting_since > _LONGEST_WAIT:
            self.flush()

    def flush(self) -> None:
        if not self._waiting or self.process != os.getpid():
            return
        new = [name for row in self._waiting for name in row if name not in self._columns]
        columns = [*self._columns, *dict.fromkeys(new)]
        if new:
            rows = [*_rows_of(self._path), *self._waiting]
            _replace(self._path, _text([dict(zip(columns, columns, strict=True)), *rows], columns))
            self._columns = columns
        else:
            _append(self._path, _text(self._waiting, columns))
        self._waiting = []


def _weakly(table: _Table) -> Any:
    reference = weakref.ref(table)

    def flush() -> None:
        living = reference()
        if living is not None:
            living.flush()

    return flush


def _text(rows: Iterable[Mapping[str, Any]], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _columns_of(path: str) -> list[str]:
    """The columns of a table that is continued; a row that a crash cut off is removed."""
    try:
        with open(path, "r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    except FileNotFoundError:
        return []
    with open(path, newline="", encoding="utf-8") as text:
        return next(csv.reader(text), [])


def _rows_of(path: str) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            # Cells beyond the last column, which this class does not write, have the name None.
            return [
                {name: cell for name, cell in row.items() if name} for row in csv.DictReader(file)
            ]
    except FileNotFoundError:
        return []


def _append(path: str, text: str) -> None:
    """Whole rows or none, also when the disk is full."""
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        data = text.encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(before)
            raise OSError(error.errno, error.strerror, path) from error


def _replace(path: str, text: str) -> None:
    """Whole or as it was before."""
    aside = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        with open(aside, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(aside)
        raise


def _plain(value: Any) -> Any:
    """As JSON has it; what that has no word for becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
