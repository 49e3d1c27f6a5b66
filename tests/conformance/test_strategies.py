"""Every strategy of the core and of torchweft-cuda is right."""

from __future__ import annotations

import pytest

from torchweft.testing import StrategyConformance


class TestSingleDevice(StrategyConformance):
    strategy = "single_device"


class TestDDP(StrategyConformance):
    strategy = "ddp"


class TestDDPThatLooksForUnusedParameters(StrategyConformance):
    strategy = "ddp:find_unused_parameters=true"


class TestFSDP(StrategyConformance):
    strategy = "fsdp"


class TestFSDPByParts(StrategyConformance):
    strategy = "fsdp:policy=Linear"
    devices = (2,)


class TestFSDPInCopies(StrategyConformance):
    strategy = "fsdp:policy=Linear,replicate=2"
    devices = (4,)


@pytest.mark.gpu
class TestDDPOnAGPU(StrategyConformance):
    strategy = "ddp"
    accelerator = "cuda"
    devices = (1,)
    tolerance = 1e-4
