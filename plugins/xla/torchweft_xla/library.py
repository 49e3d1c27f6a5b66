"""torch-xla, imported in one place."""

from __future__ import annotations

import logging
import os

# torch-xla's own default lets XLA warn with every graph that a part of it will be replaced.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Imported where there is no TPU, to see whether it can be, it says which client it would take.
_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)

try:
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.spmd as spmd
    import torch_xla.runtime as runtime
finally:
    logging.disable(_disabled)

__all__ = ["runtime", "spmd", "torch_xla", "xm"]
