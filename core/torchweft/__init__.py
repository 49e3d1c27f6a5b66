"""Scale a plain PyTorch training loop by changing five lines; backends are plugins.

Importing this module does not import torch; the first use of ``Fabric`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchweft.errors import TorchweftError
from torchweft.hookspecs import hookimpl

if TYPE_CHECKING:
    from torchweft.data.shard import shard
    from torchweft.fabric import Fabric
    from torchweft.seed import seed_everything
    from torchweft.wrappers import is_wrapped

__all__ = [
    "Fabric",
    "TorchweftError",
    "__version__",
    "hookimpl",
    "is_wrapped",
    "seed_everything",
    "shard",
]

__version__ = "0.1.0"

_LAZY = {
    "Fabric": "torchweft.fabric",
    "is_wrapped": "torchweft.wrappers",
    "seed_everything": "torchweft.seed",
    "shard": "torchweft.data.shard",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'torchweft' has no attribute '{name}'")
    import importlib

    from torchweft.process import collector_off

    # This is often what imports torch.
    with collector_off():
        value = getattr(importlib.import_module(_LAZY[name]), name)
    # The next look-up finds it as an ordinary attribute.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
