"""Which variables of the environment go to the ranks, and which belong to a node."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["moved", "shipped", "without_ray"]

#: What says where things are on one computer, who its user is, or what its terminal is.
_OF_A_NODE = frozenset(
    {
        "_",
        "CUDA_VISIBLE_DEVICES",
        "DISPLAY",
        "HOME",
        "HOST",
        "HOSTNAME",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "LOGNAME",
        "MAIL",
        "NVIDIA_VISIBLE_DEVICES",
        "OLDPWD",
        "PATH",
        "PWD",
        "PYTHONEXECUTABLE",
        "PYTHONHOME",
        "SHELL",
        "SHLVL",
        "TEMP",
        "TMP",
        "TMPDIR",
        "USER",
        "VIRTUAL_ENV",
        "XAUTHORITY",
    }
)
#: What a rank is told anew.
_OF_A_RANK = frozenset(
    {
        "GROUP_RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "RANK",
        "TORCHWEFT_RUN",
        "WORLD_SIZE",
    }
)
#: What ``ray.init()`` needs in a rank.
_OF_A_CLUSTER = ("RAY_AUTH_", "RAY_TLS_", "RAY_USE_TLS")
_PREFIXES = ("CONDA_", "DBUS_", "RAY_", "SSH_", "TORCHELASTIC_", "XDG_")


def shipped(environ: Mapping[str, str]) -> dict[str, str]:
    """What the ranks get of the environment of the process that launches them."""
    own = _OF_A_NODE | _OF_A_RANK
    return {
        name: value
        for name, value in environ.items()
        if name not in own and not name.startswith(_PREFIXES)
    }


def without_ray(environ: Mapping[str, str]) -> dict[str, str]:
    """What a rank gets of its actor's environment: all but what Ray says to the actor alone."""
    return {
        name: value
        for name, value in environ.items()
        if name != "OMP_NUM_THREADS"
        and (not name.startswith("RAY_") or name.startswith(_OF_A_CLUSTER))
    }


def moved(path: str, here: str, there: str) -> str:
    """``path`` where the folder ``here`` is ``there``; what is not in that folder stays."""
    whole, folder = Path(os.path.abspath(path)), Path(here)
    if here == there or not os.path.isabs(path) or not whole.is_relative_to(folder):
        return path
    return str(Path(there) / whole.relative_to(folder))
