"""What torchweft-cuda declares."""

from __future__ import annotations

from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec, PrecisionSpec, Preset, StrategySpec


@hookimpl
def torchweft_accelerators() -> list[AcceleratorSpec]:
    """NVIDIA GPUs."""
    return [
        AcceleratorSpec(
            name="cuda",
            target="torchweft_cuda.accelerator:CUDA",
            summary="NVIDIA GPUs",
            device="cuda",
            aliases=("gpu",),
            priority=100,
            probe="torchweft_cuda.probe:cuda",
            default_devices="all",
        )
    ]


@hookimpl
def torchweft_strategies() -> list[StrategySpec]:
    """Strategies that need torch alone."""
    return [
        StrategySpec(
            name="ddp",
            target="torchweft_cuda.ddp:DDPStrategy",
            summary="a copy of the model per process, gradients averaged (DistributedDataParallel)",
            devices=("cuda", "cpu"),
            priority=50,
            presets=(
                Preset(alias="ddp_spawn", launcher="spawn"),
                Preset(alias="ddp_fork", launcher="fork"),
                Preset(alias="ddp_notebook", launcher="fork"),
                Preset(
                    alias="ddp_find_unused_parameters_true",
                    options={"find_unused_parameters": True},
                ),
            ),
            # What DistributedDataParallel's constructor and the first backward import.
            preload=("torch.nn.parallel.distributed", "torch._dynamo"),
        ),
        StrategySpec(
            name="fsdp",
            target="torchweft_cuda.fsdp:FSDPStrategy",
            summary="parameters, gradients and optimizer state split between processes",
            devices=("cuda", "cpu"),
            preload=("torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"),
        ),
    ]


@hookimpl
def torchweft_precisions() -> list[PrecisionSpec]:
    """Mixed precision with a loss scaler."""
    return [
        PrecisionSpec(
            name="16-mixed",
            target="torchweft_cuda.half_mixed:HalfMixed",
            aliases=("16",),
            summary="parameters in 32-bit, computation in float16, with a loss scaler",
            devices=("cuda", "cpu"),
        )
    ]
