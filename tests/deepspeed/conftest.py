"""What is here needs torchweft-deepspeed, which is installed where it is tested."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("torchweft_deepspeed") is None:
    collect_ignore_glob = ["test_*.py"]
