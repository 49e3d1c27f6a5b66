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


class TestFSDPInBFloat16(StrategyConformance):
    strategy = "fsdp:policy=Linear"
    precision = "bf16-mixed"
    devices = (2,)
    tolerance = 0.05


class TestFSDPInFloat16(StrategyConformance):
    # From a smaller scale than usual: a step that overflows is left out.
    strategy = "fsdp:policy=Linear"
    precision = "16-mixed:init_scale=1024"
    devices = (2,)
    tolerance = 0.05


@pytest.mark.gpu
class TestDDPOnAGPU(StrategyConformance):
    strategy = "ddp"
    accelerator = "cuda"
    devices = (1,)
    tolerance = 1e-4


@pytest.mark.gpu
class TestFSDPOnAGPU(StrategyConformance):
    strategy = "fsdp:policy=Linear"
    accelerator = "cuda"
    devices = (1,)
    tolerance = 1e-4


@pytest.mark.gpu
class TestFSDPOnAGPUFromTheHost(StrategyConformance):
    strategy = "fsdp:policy=Linear,cpu_offload=true"
    accelerator = "cuda"
    devices = (1,)
    tolerance = 1e-4
