"""XLA's client for the processor stands in for a TPU, with as many devices as a test names."""

from __future__ import annotations

import os
from importlib.util import find_spec

if find_spec("torch_xla") is None:
    # What is here runs in an environment of its own: torch-xla needs another torch.
    collect_ignore_glob = ["test_*.py"]
else:
    # For the plans of these tests and for the processes that they start.
    os.environ["PJRT_DEVICE"] = "CPU"
