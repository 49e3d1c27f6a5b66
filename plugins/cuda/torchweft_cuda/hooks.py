"""What torchweft-cuda declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchweft.errors import InvalidRequest
from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec, PrecisionSpec, Preset, StrategySpec
from torchweft_cuda.mesh import check_reshard, sizes_for

if TYPE_CHECKING:
    from torchweft.api import RunPlan

_FSDP = "torchweft_cuda.fsdp:FSDPStrategy"


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
            target=_FSDP,
            summary="parameters, gradients, optimizer state and layers split between processes",
            devices=("cuda", "cpu"),
            presets=(Preset(alias="fsdp_cpu_offload", options={"cpu_offload": True}),),
            preload=(
                "torch.distributed.fsdp",
                "torch.distributed.tensor.parallel",
                "torch._dynamo",
            ),
        ),
    ]


@hookimpl
def torchweft_precisions() -> list[PrecisionSpec]:
    """Mixed precision with a loss scaler, and those of sharded parameters."""
    return [
        PrecisionSpec(
            name="bf16-mixed",
            target="torchweft_cuda.sharded_precision:ShardedBFloat16Mixed",
            aliases=("bf16",),
            summary="with fsdp: parameters in 32-bit, gathered in bfloat16",
            devices=("cuda", "cpu"),
            strategies=("fsdp",),
        ),
        PrecisionSpec(
            name="16-mixed",
            target="torchweft_cuda.sharded_precision:ShardedHalfMixed",
            aliases=("16",),
            summary="with fsdp: parameters in 32-bit, gathered in float16, with a loss scaler",
            devices=("cuda", "cpu"),
            strategies=("fsdp",),
        ),
        PrecisionSpec(
            name="16-mixed",
            target="torchweft_cuda.half_mixed:HalfMixed",
            aliases=("16",),
            summary="parameters in 32-bit, computation in float16, with a loss scaler",
            devices=("cuda", "cpu"),
        ),
    ]


@hookimpl
def torchweft_check_plan(plan: RunPlan) -> list[str]:
    """Whether the sizes that ``fsdp`` was given fit the number of processes."""
    options = plan.options.get("strategy", {})
    # How many nodes an elastic run will have is not known yet.
    if plan.strategy.target != _FSDP or not isinstance(plan.topology.num_nodes, int):
        return []
    sizes = {name: options.get(name) for name in ("replicate", "shard", "tensor")}
    try:
        found = sizes_for(plan.topology.world_size, **sizes)
        check_reshard(options.get("reshard_after_forward", True), found)
    except InvalidRequest as error:
        return [str(error)]
    return []
