"""Every strategy of the core and of torchweft-cuda is right."""

from __future__ import annotations

import pytest

from tests.conformance.divided import divide
from torchweft.testing import StrategyConformance
from torchweft_cuda.fsdp import FSDPStrategy


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


class TestFSDPWithDividedLayers(StrategyConformance):
    strategy = FSDPStrategy(tensor=2, parallelize=divide)
    devices = (2, 4)


@pytest.mark.gpu
class TestDDPOnAGPU(StrategyConformance):
    strategy = "ddp"
    accelerator = "cuda"
    devices = (1,)
    tolerance = 1e-4
