"""Loggers that write into a folder of their own for every run, in one process."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torchweft.errors import InvalidRequest, Misuse
from torchweft.loggers.base import Logger

__all__ = ["FolderLogger"]


class FolderLogger(Logger):
    """Writes to ``root_dir/name/version_N``, in rank 0 alone.

    Args:
        root_dir: the folder of all experiments.
        name: the experiment; None or empty: runs lie in ``root_dir`` itself.
        version: the run. A number N is the folder ``version_N``, a text the folder of that name;
            a run that is there already is continued. None: the next number that is free, picked
            and its folder made when the first value is written or the folder is first asked for.
        prefix: put before the name of every metric, with a ``-`` between.

    Raises ``InvalidRequest`` when ``root_dir`` is an address rather than a path, or a name or a
    version would lead out of it.
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        name: str | None,
        version: int | str | None,
        prefix: str,
    ) -> None:
        self._root_dir = os.fspath(root_dir)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", self._root_dir):
            raise InvalidRequest(
                f"{type(self).__name__}(root_dir='{self._root_dir}') is an address; only paths of "
                "this machine's file systems are written"
            )
        for what, value in (("name", name), ("version", version)):
            if isinstance(value, str) and (os.path.isabs(value) or ".." in value.split("/")):
                raise InvalidRequest(
                    f"{type(self).__name__}({what}='{value}') leads out of root_dir; name a "
                    "folder in it"
                )
        self._name = name or ""
        self._version = version
        self._prefix = prefix
        # A script may change its folder later, and the file stays where it was begun.
        root = os.path.abspath(os.path.expanduser(self._root_dir))
        self._experiment_dir = os.path.join(root, self._name)
        self._next_steps: dict[str, int] = {}

    @property
    def name(self) -> str:
        """The experiment, empty where it has no name."""
        return self._name

    @property
    def root_dir(self) -> str:
        """The folder of all experiments, as it was given."""
        return self._root_dir

    @property
    def version(self) -> int | str:
        """Which run of the experiment this is; picked now where it was not yet.

        Raises ``Misuse`` on another rank than 0 where it is rank 0 that picks it.
        """
        if self._version is None:
            if not writes_here():
                raise Misuse(
                    f"the version of {type(self).__name__} was asked for on another rank than 0, "
                    "and rank 0 picks it; ask there and pass it on with fabric.broadcast(), or "
                    f"give one: {type(self).__name__}(..., version=...)"
                )
            self._version = _claim_version(self._experiment_dir)
        return self._version

    @property
    def log_dir(self) -> str:
        """The folder of this run, absolute; see ``version``."""
        version = self.version
        folder = version if isinstance(version, str) else f"version_{version}"
        return os.path.join(self._experiment_dir, folder)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers by name; step None: the one after the last of these metrics.

        Raises ``InvalidRequest`` naming the first value that is no number, or the first name that
        is not one line of text.
        """
        if not writes_here() or not metrics:
            return
        numbers = {self._full_name(name): _number(name, v) for name, v in metrics.items()}
        if step is None:
            step = max(self._next_steps.get(name, 0) for name in numbers)
        step = int(step)
        self._next_steps.update(dict.fromkeys(numbers, step + 1))
        self._write(numbers, step)

    def log_hyperparams(
        self,
        params: Any,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> None:
        """Record a mapping, also nested, or an object's attributes (argparse's, a dataclass's).

        ``metrics``: numbers to compare runs by, recorded for ``step`` (None: 0) too.
        """
        if not writes_here():
            return
        numbers = {self._full_name(name): _number(name, v) for name, v in (metrics or {}).items()}
        self._write_hyperparams(_as_mapping(params), numbers, 0 if step is None else int(step))

    @abstractmethod
    def _write(self, metrics: dict[str, float], step: int) -> None:
        """Write a row of plain numbers; in the one process that writes."""

    @abstractmethod
    def _write_hyperparams(
        self, params: Mapping[str, Any], metrics: dict[str, float], step: int
    ) -> None:
        """Write the hyperparameters; in the one process that writes."""

    def _full_name(self, name: Any) -> str:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise InvalidRequest(
                f"the metric {name!r:.80} has no name that can be shown; name it by one line of "
                "text"
            )
        return f"{self._prefix}-{name}" if self._prefix else name


def writes_here() -> bool:
    """Whether this is rank 0, or a process alone: a script may use a logger in every rank."""
    # Where nobody imported it there is no group, and importing it takes a second.
    distributed = sys.modules.get("torch.distributed")
    return not (
        distributed is not None
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_rank() > 0
    )


def _claim_version(folder: str) -> int:
    """Make the folder of the next number; of two runs that start at once each gets its own."""
    os.makedirs(folder, exist_ok=True)
    while True:
        taken = [re.fullmatch(r"version_(\d+)", entry) for entry in os.listdir(folder)]
        version = max((int(match[1]) + 1 for match in taken if match), default=0)
        try:
            os.mkdir(os.path.join(folder, f"version_{version}"))
        except FileExistsError:
            continue
        return version


def _number(name: str, value: Any) -> float:
    try:
        # Tensors and NumPy's numbers have it.
        plain = value.item() if hasattr(value, "item") else value
        if isinstance(plain, str | bytes):
            raise TypeError
        return int(plain) if isinstance(plain, int) else float(plain)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidRequest(
            f"the metric '{name}' is {value!r:.80}, a {type(value).__name__}; loggers take single "
            "numbers"
        ) from None


def _as_mapping(params: Any) -> Mapping[str, Any]:
    if isinstance(params, Mapping):
        return params
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        return dataclasses.asdict(params)
    try:
        attributes: Mapping[str, Any] = vars(params)
    except TypeError:
        raise InvalidRequest(
            f"log_hyperparams() was given {params!r:.80}, a {type(params).__name__}; pass a "
            "mapping or an object with attributes"
        ) from None
    return attributes
