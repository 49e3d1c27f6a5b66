"""The whole contract between torchweft and its plugins: six hooks.

A plugin is a module of functions marked with ``hookimpl``, named by an entry point in the group
``torchweft``. Nothing here, nor in a plugin's hooks module, may import torch: the module is
imported to list what is installed.

A hook returns what its page says and never None: an implementation without a return statement is
reported as broken. No hook stops the others, so the order of installation never matters.
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

    Called by the plugin manager, once per plugin when it is loaded, in the process that makes
    the plan or prints a listing.

    Returns:
        One ``AcceleratorSpec`` for each kind of device; the specs of all plugins are put
        together. An empty list where this platform has none.
    """
    return ()


@_hookspec
def torchweft_strategies() -> Iterable[StrategySpec]:
    """Declare strategies.

    Called by the plugin manager, once per plugin when it is loaded, in the process that makes
    the plan or prints a listing.

    Returns:
        One ``StrategySpec`` for each way of spreading work; the specs of all plugins are put
        together. An empty list where there is none to declare.
    """
    return ()


@_hookspec
def torchweft_precisions() -> Iterable[PrecisionSpec]:
    """Declare precisions.

    Called by the plugin manager, once per plugin when it is loaded, in the process that makes
    the plan or prints a listing.

    Returns:
        One ``PrecisionSpec`` for each combination of number formats; the specs of all plugins
        are put together. An empty list where there is none to declare.
    """
    return ()


@_hookspec
def torchweft_launchers() -> Iterable[LauncherSpec]:
    """Declare launchers.

    Called by the plugin manager, once per plugin when it is loaded, in the process that makes
    the plan or prints a listing.

    Returns:
        One ``LauncherSpec`` for each way of making processes; the specs of all plugins are put
        together. An empty list where there is none to declare.
    """
    return ()


@_hookspec
def torchweft_check_plan(plan: RunPlan) -> Iterable[str]:
    """Object to a plan.

    Called by the resolution, once, after all choices were made and before any process starts;
    by each rank too, which makes the same plan again.

    Args:
        plan: what is about to be run; plain data, nothing of it exists yet.

    Returns:
        One sentence per objection, each with the way out. The objections of all plugins are
        raised together, in one ``IncompatiblePlan``. An empty list when there is none.
    """
    return ()


@_hookspec
def torchweft_worker_context(run: Any) -> AbstractContextManager[Any]:
    """Wrap what the user's code does in a rank.

    Called by the worker, once in every process, after device and process group exist and before
    user code.

    Args:
        run: the live ``torchweft.api.Run`` of this process.

    Returns:
        A context manager. Those of all plugins are entered one after another and left in
        reverse order, before the process group is destroyed; they receive the exception when
        the rank failed with one. ``contextlib.nullcontext()`` where there is nothing to wrap.
    """
    raise NotImplementedError
