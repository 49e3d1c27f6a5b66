"""Keys that DeepSpeed does not know, by what it reads itself."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.deepspeed import ranks
from torchweft.errors import RankFailed
from torchweft.testing import run_ranks
from torchweft_deepspeed.strategy import DeepSpeedStrategy


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"gradient_predivide_facto": 1.0},
            "'gradient_predivide_facto', which DeepSpeed does not know; did you mean 'gradient_pre",
        ),
        (
            {"zero_optimization": {"overlap_com": True}},
            r"'zero_optimization\.overlap_com', which DeepSpeed does not know; did you mean 'overl",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memry": True}}},
            r"offload_optimizer\.pin_memry', which DeepSpeed does not know; did you mean 'pin_mem",
        ),
    ],
)
def test_an_unknown_key_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(RankFailed, match=words):
        run_ranks(1, ranks.train_long, strategy=DeepSpeedStrategy(config=config))


def test_the_keys_of_its_documentation_are_known() -> None:
    code = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
from torchweft_deepspeed.configuration import _read_by_deepspeed
known = _read_by_deepspeed()
for key in ("activation_checkpointing aio autotuning checkpoint communication_data_type "
            "comms_logger csv_monitor data_efficiency data_types dataloader_drop_last "
            "disable_allgather dump_state elasticity flops_profiler gradient_predivide_factor "
            "memory_breakdown prescale_gradients sparse_gradients steps_per_print tensorboard "
            "wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
            "zero_optimization").split():
    assert key in known, key
"""
    subprocess.run([sys.executable, "-c", code], check=True)
