"""Loggers: where the numbers of a run go. ``Fabric(loggers=[...])`` takes any of them."""

from __future__ import annotations

from torchweft.loggers.base import Logger
from torchweft.loggers.csv_logger import CSVLogger
from torchweft.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger"]
