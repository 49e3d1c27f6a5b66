"""Fixtures that run real commands, and the parameters of one process."""

from __future__ import annotations

from tests.endtoend.conftest import run, start
from tests.endtoend.test_parity import alone

__all__ = ["alone", "run", "start"]
