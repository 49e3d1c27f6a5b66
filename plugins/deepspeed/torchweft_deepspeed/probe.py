"""Whether DeepSpeed can be used here, found out without importing it or torch."""

from __future__ import annotations

import importlib.util
import os
import shutil

from torchweft.specs import Availability

__all__ = ["deepspeed"]


def deepspeed() -> Availability:
    """DeepSpeed is installed, and what compiles its extensions at their first use is there."""
    # ``find_spec`` of a top-level name looks for its file and runs none of it.
    if importlib.util.find_spec("deepspeed") is None:
        return Availability(
            ok=False,
            reason="the package deepspeed is not installed",
            hint="pip install deepspeed",
        )
    if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        return Availability(
            ok=False,
            reason="DeepSpeed compiles its extensions when they are first used, and ninja is not "
            "here",
            hint="pip install ninja",
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        named = f"the compiler CXX='{compiler}'" if "CXX" in os.environ else "a C++ compiler (c++)"
        return Availability(
            ok=False,
            reason="DeepSpeed compiles its extensions when they are first used, and "
            f"{named} is not here",
            hint="install one (apt install g++), or name it in the environment variable CXX",
        )
    return Availability(ok=True)
