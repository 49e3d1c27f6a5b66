"""Compiles what the tests need of DeepSpeed's extensions, unless that was done before."""

from __future__ import annotations

import sys

from torchweft_deepspeed import library
from torchweft_deepspeed.probe import deepspeed as probe


def compile_all() -> str:
    """Returns why nothing was compiled; empty where it was."""
    found = probe()
    if not found.ok:
        return f"{found.reason}: {found.hint}"
    library.load("cpu")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load(verbose=False)
    return ""


if __name__ == "__main__":
    left = compile_all()
    said = f"not compiled: {left}" if left else "DeepSpeed's extensions are compiled"
    print(said, file=sys.stderr)
