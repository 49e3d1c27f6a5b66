"""The conformance kit: what the author of a backend proves it right with.

A whole test file::

    from torchweft.testing import StrategyConformance

    class TestMine(StrategyConformance):
        strategy = "mine"

Needs pytest: ``pip install "torchweft[testing]"``. Importing this module imports neither pytest
nor torch; the first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchweft.testing.accelerator import AcceleratorConformance
    from torchweft.testing.interpreter import Interpreted, fresh_interpreter
    from torchweft.testing.launcher import LauncherConformance
    from torchweft.testing.plugin import PluginConformance
    from torchweft.testing.precision import PrecisionConformance
    from torchweft.testing.ranks import RanksTimeout, run_ranks
    from torchweft.testing.recorder import HookCall, HookRecorder, Recorded
    from torchweft.testing.strategy import StrategyConformance

__all__ = [
    "AcceleratorConformance",
    "HookCall",
    "HookRecorder",
    "Interpreted",
    "LauncherConformance",
    "PluginConformance",
    "PrecisionConformance",
    "RanksTimeout",
    "Recorded",
    "StrategyConformance",
    "fresh_interpreter",
    "run_ranks",
]

_LAZY = {
    "AcceleratorConformance": "accelerator",
    "HookCall": "recorder",
    "HookRecorder": "recorder",
    "Interpreted": "interpreter",
    "LauncherConformance": "launcher",
    "PluginConformance": "plugin",
    "PrecisionConformance": "precision",
    "RanksTimeout": "ranks",
    "Recorded": "recorder",
    "StrategyConformance": "strategy",
    "fresh_interpreter": "interpreter",
    "run_ranks": "ranks",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'torchweft.testing' has no attribute '{name}'")
    import importlib

    try:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        from torchweft.errors import NotAvailable

        raise NotAvailable(
            f"{name} of torchweft.testing needs pytest, which is not installed; try: "
            'pip install "torchweft[testing]"'
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
