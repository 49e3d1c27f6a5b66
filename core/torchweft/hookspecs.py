"""The whole contract between torchweft and its plugins: six hooks.

A plugin is a module of functions marked with ``hookimpl``, named by an entry point in the group
``torchweft``. Nothing here, nor in a plugin's hooks module, may import torch: the module is
imported to list what is installed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torchweft.plan import RunPlan
    from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, StrategySpec

__all__ = [
    "NAME",
    "hookimpl",
    "torchweft_accelerators",
    "torchweft_check_plan",
    "torchweft_launchers",
    "torchweft_precisions",
    "torchweft_strategies",
    "torchweft_worker_context",
]

#: Entry-point group, hook marker and plugin manager share this name.
NAME = "torchweft"

_hookspec = pluggy.HookspecMarker(NAME)
hookimpl = pluggy.HookimplMarker(NAME)


@_hookspec
def torchweft_accelerators() -> Iterable[AcceleratorSpec]:
    """Declare accelerators.

    Called once per plugin, when it is loaded, in the process that makes the plan. The results of
    all plugins are put together; their order never matters.
    """
    return ()


@_hookspec
def torchweft_strategies() -> Iterable[StrategySpec]:
    """Declare strategies.

    Called once per plugin, when it is loaded, in the process that makes the plan. The results of
    all plugins are put together; their order never matters.
    """
    return ()


@_hookspec
def torchweft_precisions() -> Iterable[PrecisionSpec]:
    """Declare precisions.

    Called once per plugin, when it is loaded, in the process that makes the plan. The results of
    all plugins are put together; their order never matters.
    """
    return ()


@_hookspec
def torchweft_launchers() -> Iterable[LauncherSpec]:
    """Declare launchers.

    Called once per plugin, when it is loaded, in the process that makes the plan. The results of
    all plugins are put together; their order never matters.
    """
    return ()


@_hookspec
def torchweft_check_plan(plan: RunPlan) -> Iterable[str]:
    """Object to a plan: one sentence per objection, each with the way out.

    Called once, after all choices were made and before any process starts. The objections of all
    plugins are raised together, in one ``IncompatiblePlan``. Return an empty list when there is
    nothing to object to.
    """
    return ()


@_hookspec
def torchweft_worker_context(run: Any) -> AbstractContextManager[Any]:
    """Wrap what the user's code does in a rank.

    Called in every process, after device and process group exist and before user code. ``run``
    is the live ``torchweft.api.Run``. The contexts of all plugins are entered one after another
    and left in reverse order, before the process group is destroyed; they receive the exception
    when the rank failed with one.
    """
    raise NotImplementedError
