"""Compiles what the tests need of DeepSpeed's extensions, unless that was done before.

That for a drive takes minutes: it is compiled where ``TORCHWEFT_SOAK=1`` asks for it, and tests of
a drive run wherever it is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from torchweft_deepspeed import library
from torchweft_deepspeed.probe import deepspeed as probe
from torchweft_deepspeed.requests import _has_aio

_DRIVE = "async_io"


def has_drive() -> bool:
    """Whether what reads and writes a drive is compiled."""
    return _has_aio() and Path(_get_build_directory(_DRIVE, False), f"{_DRIVE}.so").exists()


needs_drive = pytest.mark.skipif(
    not has_drive(),
    reason="needs libaio (apt install libaio-dev) and DeepSpeed's extension for it, which takes "
    "minutes to compile: TORCHWEFT_SOAK=1 make extensions",
)


def compile_all() -> str:
    """Returns why nothing was compiled; empty where it was."""
    found = probe()
    if not found.ok:
        return f"{found.reason}: {found.hint}"
    library.load("cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    CPUAdamBuilder().load(verbose=False)
    if os.environ.get("TORCHWEFT_SOAK") == "1" and _has_aio():
        AsyncIOBuilder().load(verbose=False)
    return ""


if __name__ == "__main__":
    left = compile_all()
    said = f"not compiled: {left}" if left else "DeepSpeed's extensions are compiled"
    print(said, file=sys.stderr)
