"""Strategy ``deepspeed`` trains, saves and loads as one process does, at every stage."""

from __future__ import annotations

from torchweft.testing import StrategyConformance


class TestStage0(StrategyConformance):
    strategy = "deepspeed:stage=0"


class TestStage1(StrategyConformance):
    strategy = "deepspeed_stage_1"


class TestStage2(StrategyConformance):
    strategy = "deepspeed_stage_2"


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
