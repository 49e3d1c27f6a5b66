"""What torchweft-deepspeed declares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchweft.hookspecs import hookimpl
from torchweft.specs import PrecisionSpec, Preset, StrategySpec
from torchweft_deepspeed.requests import objections

if TYPE_CHECKING:
    from torchweft.api import RunPlan

_STRATEGY = "torchweft_deepspeed.strategy:DeepSpeedStrategy"
_PRECISIONS = "torchweft_deepspeed.precision"
_DEVICES = ("cuda", "cpu")


@hookimpl
def torchweft_strategies() -> list[StrategySpec]:
    """ZeRO, whose stages have names of their own."""
    host, disk = {"offload_optimizer": "cpu"}, {"offload_optimizer": "nvme"}
    parameters, on_disk = {"offload_parameters": "cpu"}, {"offload_parameters": "nvme"}
    presets: dict[str, dict[str, Any]] = {
        "1": {"stage": 1},
        "1_offload": {"stage": 1, **host},
        "2": {"stage": 2},
        "2_offload": {"stage": 2, **host},
        "3": {"stage": 3},
        "3_offload": {"stage": 3, **host, **parameters},
        "3_offload_nvme": {"stage": 3, **disk, **on_disk},
    }
    return [
        StrategySpec(
            name="deepspeed",
            target=_STRATEGY,
            summary="optimizer state, gradients, parameters split by stage (DeepSpeed ZeRO)",
            devices=_DEVICES,
            probe="torchweft_deepspeed.probe:deepspeed",
            presets=tuple(
                Preset(alias=f"deepspeed_stage_{name}", options=options)
                for name, options in presets.items()
            ),
            preload=_preload(Path("/dev")),
            # Number formats are a part of DeepSpeed's own configuration.
            exclusive=("precision",),
        )
    ]


def _preload(devices: Path) -> tuple[str, ...]:
    """What DeepSpeed imports, at the latest for its first engine.

    Itself it looks for a device when it is imported, and so do two of torch's modules: they ask
    for the number of GPUs, after which no fork can use one. Where there is none they may.
    """
    gpus = any(found for name in ("nvidia[0-9]*", "kfd", "dxg") for found in devices.glob(name))
    looking = () if gpus else ("torch._inductor.compile_fx", "torch.utils.cpp_extension")
    return ("torch._dynamo", *looking, "pydantic")


@hookimpl
def torchweft_precisions() -> list[PrecisionSpec]:
    """DeepSpeed's own, each a block of its configuration."""
    return [
        _precision("32-true", "Full", "32-bit throughout", ("32",), priority=100),
        _precision("bf16-true", "BFloat16", "model in bfloat16, updated in 32-bit"),
        _precision("16-true", "Half", "model in float16, updated in 32-bit, with a loss scaler"),
        _precision(
            "bf16-mixed",
            "BFloat16Mixed",
            "parameters in 32-bit, computed with in bfloat16",
            ("bf16",),
        ),
        _precision(
            "16-mixed",
            "HalfMixed",
            "parameters in 32-bit, computed with in float16, loss scaled",
            ("16",),
        ),
    ]


def _precision(
    name: str, cls: str, summary: str, aliases: tuple[str, ...] = (), priority: int | None = None
) -> PrecisionSpec:
    return PrecisionSpec(
        name=name,
        target=f"{_PRECISIONS}:{cls}",
        summary=f"with deepspeed: {summary}",
        aliases=aliases,
        priority=priority,
        devices=_DEVICES,
        strategies=("deepspeed",),
    )


@hookimpl
def torchweft_check_plan(plan: RunPlan) -> list[str]:
    """What the options of ``deepspeed`` say that cannot be."""
    if plan.strategy.target != _STRATEGY:
        return []
    device = plan.accelerator.device
    return objections(plan.options.get("strategy", {}), device)
