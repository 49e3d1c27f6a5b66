"""The plugin, its accelerator and every precision that serves it keep what all promise.

XLA compiles each of a precision's many small computations: ``TORCHWEFT_SOAK=1`` tries them.
"""

from __future__ import annotations

import os

import pytest

from torchweft.testing import AcceleratorConformance, PluginConformance, PrecisionConformance

minutes = pytest.mark.skipif(
    os.environ.get("TORCHWEFT_SOAK") != "1", reason="takes minutes; TORCHWEFT_SOAK=1 runs it"
)


class TestPlugin(PluginConformance):
    plugin = "xla"


class TestAccelerator(AcceleratorConformance):
    accelerator = "xla"
    timeout = 120.0


@minutes
class TestFull(PrecisionConformance):
    precision = "32-true"
    accelerator = "xla"
    strategy = "single_xla"


@minutes
class TestBFloat16Mixed(PrecisionConformance):
    precision = "bf16-mixed"
    accelerator = "xla"
    strategy = "single_xla"


@minutes
class TestBFloat16(PrecisionConformance):
    precision = "bf16-true"
    accelerator = "xla"
    strategy = "single_xla"


@minutes
class TestHalf(PrecisionConformance):
    precision = "16-true"
    accelerator = "xla"
    strategy = "single_xla"
