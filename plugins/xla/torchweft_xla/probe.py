"""Whether torch-xla can be used here, and on how many devices, without importing it or torch."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from torchweft.specs import Availability

__all__ = ["xla"]

#: What ``PJRT_DEVICE`` may be.
_CLIENTS = ("TPU", "CPU")

_PCI = Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"

#: XLA devices by the PCI id of a TPU chip: v2 and v3 have two cores, each a device of its own.
_CHIPS: Mapping[str, int] = {
    "0x0027": 2,  # v2, v3
    "0x005e": 1,  # v4
    "0x0062": 1,  # v5p
    "0x0063": 1,  # v5e
    "0x006f": 1,  # v6e
    "0x0076": 2,  # 7x
}


def xla() -> Availability:
    """torch-xla is installed, fits the torch beside it, and has a client with devices."""
    # ``find_spec`` of a top-level name looks for its file and runs none of it.
    if importlib.util.find_spec("torch_xla") is None:
        return Availability(
            ok=False,
            reason="the package torch-xla is not installed",
            hint="pip install torch==2.9.0 torch-xla==2.9.0, in an environment of its own",
        )
    return _unpaired() or _devices(os.environ)


def _unpaired() -> Availability | None:
    """torch-xla is compiled against one torch; beside another it misses a symbol."""
    own, torch = (_release(metadata.version(name)) for name in ("torch-xla", "torch"))
    if own == torch:
        return None
    return Availability(
        ok=False,
        reason=f"torch-xla {own} is made for torch {own}, and torch {torch} is installed: "
        "importing it would end in an undefined symbol",
        hint=f"pip install torch=={own} torch-xla=={own}, in an environment of its own",
    )


def _release(version: str) -> str:
    """``2.9.0`` of ``2.9.0+cu128``, ``2.9.0rc1`` or ``2.9.0.dev20250901``."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found.group() if found else version


def _devices(environ: Mapping[str, str]) -> Availability:
    client = environ.get("PJRT_DEVICE")
    if client not in (None, "", *_CLIENTS):
        known = " or ".join(_CLIENTS)
        return Availability(
            ok=False,
            reason=f"PJRT_DEVICE='{client}' is no client of XLA that this package serves",
            hint=f"set PJRT_DEVICE to {known}, or leave it out where there is a TPU",
        )
    if client == "CPU":
        return _processor(environ.get("CPU_NUM_DEVICES", "1"))
    count = _chips(environ)
    if not count:
        return Availability(
            ok=False,
            reason="there is no TPU on this computer's PCI bus",
            hint="run on a TPU VM, or set PJRT_DEVICE=CPU for XLA on the processor "
            "(CPU_NUM_DEVICES=4 makes it four devices)",
        )
    return Availability(ok=True, count=count)


def _processor(asked: str) -> Availability:
    if not asked.isdecimal() or not int(asked):
        return Availability(
            ok=False,
            reason=f"CPU_NUM_DEVICES='{asked}' is no number of devices",
            hint="set CPU_NUM_DEVICES to 1 or more, or leave it out",
        )
    return Availability(ok=True, count=int(asked))


def _chips(environ: Mapping[str, str]) -> int:
    """Devices of the TPU chips that this process may see."""
    found = []
    for vendor in sorted(_PCI.glob("*/vendor")):
        if vendor.read_text().strip() == _GOOGLE:
            chip = vendor.with_name("device").read_text().strip()
            found.append(_CHIPS.get(chip, 0))
    found = [devices for devices in found if devices]
    visible = environ.get("TPU_VISIBLE_CHIPS", environ.get("TPU_VISIBLE_DEVICES", ""))
    if visible:
        found = found[: len(visible.split(","))]
    return sum(found)
