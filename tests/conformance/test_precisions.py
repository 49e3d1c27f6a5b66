"""Every precision of the core and of torchweft-cuda is right on the processor."""

from __future__ import annotations

from torchweft.testing import PrecisionConformance


class TestFull(PrecisionConformance):
    precision = "32-true"


class TestDouble(PrecisionConformance):
    precision = "64-true"


class TestBFloat16(PrecisionConformance):
    precision = "bf16-true"


class TestHalf(PrecisionConformance):
    precision = "16-true"


class TestBFloat16Mixed(PrecisionConformance):
    precision = "bf16-mixed"


class TestHalfMixed(PrecisionConformance):
    precision = "16-mixed"
