"""What torchweft-xla declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, StrategySpec
from torchweft_xla.requests import objections

if TYPE_CHECKING:
    from torchweft.api import RunPlan

_STRATEGY = "torchweft_xla.strategy"
_DEVICES = ("xla",)
# Its import takes seconds; no client is started by it.
_PRELOAD = ("torchweft_xla.library",)


@hookimpl
def torchweft_accelerators() -> list[AcceleratorSpec]:
    """TPUs, and the processor through XLA."""
    return [
        AcceleratorSpec(
            name="xla",
            target="torchweft_xla.accelerator:XLA",
            summary="TPUs, and with PJRT_DEVICE=CPU the processor, through XLA",
            device="xla",
            aliases=("tpu",),
            # Where torch-xla was installed and has a device it was meant to be used.
            priority=200,
            probe="torchweft_xla.probe:xla",
            default_devices="all",
            # A strategy that ends no graph would compile one without end.
            exclusive=("strategy",),
        )
    ]


@hookimpl
def torchweft_strategies() -> list[StrategySpec]:
    """One process drives all devices of its host (SPMD)."""
    return [
        StrategySpec(
            name="xla",
            target=f"{_STRATEGY}:XLAStrategy",
            summary="a copy of the model on each XLA device, one process per host (SPMD)",
            devices=_DEVICES,
            priority=100,
            processes="node",
            preload=_PRELOAD,
        ),
        StrategySpec(
            name="xla_fsdp",
            target="torchweft_xla.fsdp:XLAFSDPStrategy",
            summary="parameters, gradients and optimizer state split between XLA devices (SPMD)",
            devices=_DEVICES,
            aliases=("fsdp",),
            processes="node",
            preload=_PRELOAD,
        ),
        StrategySpec(
            name="xla_replicas",
            target="torchweft_xla.replicas:XLAReplicasStrategy",
            summary="a copy of the model in a process per XLA device, gradients averaged",
            devices=_DEVICES,
            preload=_PRELOAD,
        ),
        StrategySpec(
            name="single_xla",
            target=f"{_STRATEGY}:SingleXLA",
            summary="one process on one XLA device",
            devices=_DEVICES,
            # What other devices call it.
            aliases=("single_device",),
            processes="one",
            preload=_PRELOAD,
        ),
    ]


@hookimpl
def torchweft_precisions() -> list[PrecisionSpec]:
    """What XLA does otherwise than torch; the core's others serve it as they are."""
    return [
        PrecisionSpec(
            name="32-true",
            target="torchweft_xla.precision:Full",
            summary="on XLA: 32-bit throughout, products of matrices on a TPU too",
            aliases=("32",),
            priority=110,
            devices=_DEVICES,
        )
    ]


@hookimpl
def torchweft_launchers() -> list[LauncherSpec]:
    """torch-xla's own."""
    return [
        LauncherSpec(
            name="xla_launch",
            target="torchweft_xla.launching:XLALaunch",
            summary="fabric.launch(function) in processes that torch_xla.launch makes",
            devices=_DEVICES,
            strategies=("xla_replicas",),
            detect="torchweft_xla.detect:launched",
            nodes="any",
            function="required",
        )
    ]


@hookimpl
def torchweft_check_plan(plan: RunPlan) -> list[str]:
    """Whether XLA can use just these devices."""
    return objections(plan)
