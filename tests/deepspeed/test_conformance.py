"""Strategy ``deepspeed`` trains, saves and loads as one process does, at every stage.

Stage 2 in 32 bits and stage 3 in bfloat16 run on two devices here; ``TORCHWEFT_SOAK=1`` runs every
stage, on one device too.
"""

from __future__ import annotations

import os

import pytest

from torchweft.testing import StrategyConformance

DEVICES = (1, 2) if os.environ.get("TORCHWEFT_SOAK") == "1" else (2,)


class TestStage0(StrategyConformance):
    strategy = "deepspeed:stage=0"
    devices = DEVICES


class TestStage1(StrategyConformance):
    strategy = "deepspeed_stage_1"
    devices = DEVICES


class TestStage2(StrategyConformance):
    strategy = "deepspeed_stage_2"
    devices = DEVICES


class TestStage3(StrategyConformance):
    # By default the parameters of small models are not divided.
    strategy = "deepspeed_stage_3:stage3_param_persistence_threshold=0"


class TestStage0InBFloat16(StrategyConformance):
    strategy = "deepspeed:stage=0"
    precision = "bf16-mixed"
    tolerance = 0.03
    devices = (2,)


class TestStage1InBFloat16(StrategyConformance):
    strategy = "deepspeed_stage_1"
    precision = "bf16-mixed"
    tolerance = 0.03
    devices = (2,)


class TestStage2InBFloat16(StrategyConformance):
    strategy = "deepspeed_stage_2"
    precision = "bf16-true"
    tolerance = 0.03
    devices = (2,)


class TestStage3InBFloat16(StrategyConformance):
    strategy = "deepspeed_stage_3:stage3_param_persistence_threshold=0"
    precision = "bf16-mixed"
    tolerance = 0.03
    devices = (2,)


@pytest.mark.gpu
class TestStage2OnAGPU(StrategyConformance):
    strategy = "deepspeed_stage_2"
    accelerator = "cuda"
    devices = (1,)
    tolerance = 1e-4


@pytest.mark.gpu
class TestStage3OnAGPU(StrategyConformance):
    strategy = "deepspeed_stage_3:stage3_param_persistence_threshold=0"
    accelerator = "cuda"
    devices = (1,)
    tolerance = 1e-4
