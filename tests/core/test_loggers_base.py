"""What a logger of one's own needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from torchweft import Fabric
from torchweft.loggers import Logger


class Notes(Logger):
    """The least that a logger can be."""

    name = "notes"
    version = 3

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((dict(metrics), step))

    def log_hyperparams(self, params: Any) -> None:
        self.rows.append(params)

    def save(self) -> None:
        self.rows.append("saved")


def test_a_logger_of_ones_own() -> None:
    notes = Notes()
    Fabric(accelerator="cpu", loggers=notes).log("loss", 0.5, step=2)
    notes.finalize("success")
    assert notes.rows == [({"loss": 0.5}, 2), "saved"]
    assert notes.root_dir is None
    assert notes.log_dir is None


def test_what_is_missing_is_told_at_construction() -> None:
    class Half(Logger):
        name = "half"
        version = None

    with pytest.raises(TypeError, match=r"abstract methods '?log_hyperparams'?, '?log_metrics"):
        Half()  # type: ignore[abstract]


def test_a_logger_written_for_another_library_works() -> None:
    class Foreign:
        """With the arguments of loggers for Lightning, and nothing of ours."""

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.last = metrics, step

    foreign = Foreign()
    Fabric(accelerator="cpu", loggers=[foreign]).log_dict({"a": 1.0}, step=4)
    assert foreign.last == ({"a": 1.0}, 4)
