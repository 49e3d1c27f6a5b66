"""Metrics of a run as event files of TensorBoard."""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchweft.errors import Misuse, NotAvailable
from torchweft.loggers.folder import FolderLogger, writes_here

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger(FolderLogger):
    """Writes event files of TensorBoard to ``root_dir/name/version_N``.

    Look at them with ``tensorboard --logdir root_dir``, or with ``torchweft logs root_dir``.

    Args:
        root_dir: the folder of all experiments.
        name: the experiment; None or empty: runs lie in ``root_dir`` itself.
        version: the run: a number N is the folder ``version_N``, a text the folder of that name,
            and a further event file continues one that is there. None: the next number that is
            free, picked with the first value.
        default_hp_metric: whether hyperparameters that are recorded without a metric get the
            metric ``hp_metric`` of -1, without which TensorBoard shows no row for them.
        prefix: put before the name of every metric, with a ``-`` between.
        sub_dir: a folder in the run's folder for the event files.
        purge_step: the step from which TensorBoard leaves out what earlier files of the run hold.
        max_queue: events that are kept in memory before they are written.
        flush_secs: seconds after which they are written anyway.
        filename_suffix: put behind the names of the event files.

    Raises ``NotAvailable`` where TensorBoard is not installed.
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        name: str | None = "torchweft_logs",
        version: int | str | None = None,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        *,
        purge_step: int | None = None,
        max_queue: int = 10,
        flush_secs: int = 120,
        filename_suffix: str = "",
    ) -> None:
        super().__init__(root_dir, name, version, prefix)
        # Looked for and not imported, which takes a second and belongs to the rank that writes.
        if importlib.util.find_spec("tensorboard") is None:
            raise NotAvailable(
                "TensorBoardLogger needs the package tensorboard, which is not installed; try: "
                'pip install "torchweft[logs]"'
            )
        self._default_hp_metric = default_hp_metric
        self._sub_dir = "" if sub_dir is None else os.fspath(sub_dir)
        self._options: dict[str, Any] = {
            "max_queue": max_queue,
            "flush_secs": flush_secs,
            "filename_suffix": filename_suffix,
        }
        self._purge_step = purge_step
        self._writer: SummaryWriter | None = None
        self._process = 0

    @property
    def log_dir(self) -> str:
        """The folder of the event files, absolute; see ``version``."""
        return os.path.join(super().log_dir, self._sub_dir) if self._sub_dir else super().log_dir

    @property
    def experiment(self) -> SummaryWriter:
        """torch's ``SummaryWriter``, for images, texts and whatever else TensorBoard shows.

        Raises ``Misuse`` on another rank than 0.
        """
        if not writes_here():
            raise Misuse(
                "TensorBoardLogger.experiment was asked for on another rank than 0, and rank 0 "
                "alone writes; put the line under 'if fabric.is_global_zero:'"
            )
        # The thread of a writer does not live on in a process that was forked.
        if self._writer is None or self._process != os.getpid():
            self._writer = self._open(purge_step=self._purge_step)
            self._process = os.getpid()
            # Also where nobody ends the run: at the end of the process, or of this object.
            weakref.finalize(self, _close, self._writer, self._process)
        return self._writer

    def log_graph(self, model: nn.Module, input_array: Any = None) -> None:
        """Record the graph of a model, traced with ``input_array``: its input, or a tuple of them.

        None: the model's attribute ``example_input_array``. Raises ``Misuse`` without either.
        """
        if not writes_here():
            return
        if input_array is None:
            input_array = getattr(model, "example_input_array", None)
        if input_array is None:
            raise Misuse(
                "log_graph() traces the model with an input, and has none; pass it as "
                "input_array=, or set model.example_input_array"
            )
        self.experiment.add_graph(model, input_array)

    def save(self) -> None:
        """Write the events that are kept in memory."""
        if self._writer is not None and self._process == os.getpid():
            self._writer.flush()

    def finalize(self, status: str) -> None:
        """Write everything and close the file; a later value opens a further one."""
        if self._writer is not None:
            _close(self._writer, self._process)
            self._writer = None

    def _write(self, metrics: dict[str, float], step: int) -> None:
        writer = self.experiment
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def _write_hyperparams(
        self, params: Mapping[str, Any], metrics: dict[str, float], step: int
    ) -> None:
        from torch.utils.tensorboard.summary import hparams

        if not metrics and self._default_hp_metric:
            metrics = {"hp_metric": -1}
        # A writer of its own, whose thread ends here: recorded before launch(), hyperparameters
        # do not keep the process from being forked.
        writer = self._open(purge_step=None)
        file: Any = writer.file_writer
        try:
            for summary in hparams(_flat(params), metrics):  # type: ignore[no-untyped-call]
                file.add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
        finally:
            writer.close()

    def _open(self, *, purge_step: int | None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.log_dir, purge_step=purge_step, **self._options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None}


def _close(writer: SummaryWriter, process: int) -> None:
    if process == os.getpid():
        writer.close()


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, bool | str | float | int]:
    """``{"model": {"width": 8}}`` as ``{"model/width": 8}``; TensorBoard shows single values."""
    flat: dict[str, bool | str | float | int] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{name}/"))
        else:
            flat[name] = value if isinstance(value, bool | str | float | int) else str(value)
    return flat
