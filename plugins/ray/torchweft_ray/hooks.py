"""What torchweft-ray declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchweft.hookspecs import hookimpl
from torchweft.specs import LauncherSpec
from torchweft_ray.requests import objections

if TYPE_CHECKING:
    from torchweft.api import RunPlan


@hookimpl
def torchweft_launchers() -> list[LauncherSpec]:
    """Asked for by name alone: a cluster that happens to run is not meant for every script."""
    return [
        LauncherSpec(
            name="ray",
            target="torchweft_ray.launcher:Ray",
            summary="an actor for each rank on a Ray cluster, on any number of its nodes",
            devices=("cpu", "cuda"),
            probe="torchweft_ray.probe:ray",
            detect="torchweft_ray.detect:made",
            nodes="any",
        )
    ]


@hookimpl
def torchweft_check_plan(plan: RunPlan) -> list[str]:
    """Whether Ray can be asked for just that."""
    return objections(plan)
