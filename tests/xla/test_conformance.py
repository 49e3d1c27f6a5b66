"""The strategies train as one process does, on one, two and four devices."""

from __future__ import annotations

from typing import ClassVar

from torchweft.testing import StrategyConformance

PROCESSOR = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "{devices}"}


class _OnXLA(StrategyConformance):
    accelerator = "xla"
    devices = (1, 2, 4)
    tolerance = 1e-4
    timeout = 180.0
    environ: ClassVar[dict[str, str]] = PROCESSOR
    __test__ = False


class TestXLA(_OnXLA):
    strategy = "xla"
    __test__ = True


class TestXLAFSDP(_OnXLA):
    strategy = "xla_fsdp"
    __test__ = True


class TestSingleXLA(_OnXLA):
    strategy = "single_xla"
    devices = (1,)
    __test__ = True
