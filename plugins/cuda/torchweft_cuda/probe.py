"""Whether NVIDIA GPUs can be used here, found out without torch and without waking a device."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from pathlib import Path

from torchweft.specs import Availability

__all__ = ["cuda", "torch_build", "visible"]

_PROC = Path("/proc/driver/nvidia/gpus")


def cuda() -> Availability:
    """GPUs that the driver shows and ``CUDA_VISIBLE_DEVICES`` leaves."""
    present = _driver_count()
    version, built_for = torch_build()
    if present is None:
        return Availability(
            ok=False,
            reason="no NVIDIA driver answers (libnvidia-ml.so.1 was not found)",
            hint="install NVIDIA's driver, or use accelerator='cpu'",
        )
    if present == 0:
        return Availability(
            ok=False,
            reason="the NVIDIA driver reports no GPU",
            hint="check nvidia-smi, or use accelerator='cpu'",
        )
    if not built_for:
        return Availability(
            ok=False,
            reason=f"this computer has {present} NVIDIA GPU(s), but torch {version} was built "
            "without CUDA",
            hint="install a CUDA build of torch: pip install --force-reinstall torch",
        )
    count = visible(present, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if count == 0:
        setting = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Availability(
            ok=False,
            reason=f"CUDA_VISIBLE_DEVICES='{setting}' hides all {present} GPU(s)",
            hint="unset CUDA_VISIBLE_DEVICES, or list the GPUs to use",
        )
    return Availability(ok=True, count=count)


def visible(present: int, setting: str | None) -> int:
    """How many of ``present`` GPUs a value of ``CUDA_VISIBLE_DEVICES`` leaves.

    As the driver reads it: the list ends at the first entry that is not a GPU, and an entry that
    occurs twice hides all. Names (``GPU-…``, ``MIG-…``) are counted as they stand.
    """
    if setting is None:
        return present
    seen: list[str] = []
    for entry in (piece.strip() for piece in setting.split(",")):
        if entry.startswith(("GPU-", "MIG-")):
            seen.append(entry)
        elif re.fullmatch(r"\d+", entry) and int(entry) < present:
            seen.append(str(int(entry)))
        else:
            break
    return len(seen) if len(set(seen)) == len(seen) else 0


def _driver_count() -> int | None:
    """GPUs by NVIDIA's management library, which starts no context; None without a driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        # In some containers only the driver's files are there.
        return len(list(_PROC.iterdir())) if _PROC.is_dir() else None
    if nvml.nvmlInit_v2() != 0:
        return 0
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return 0
        return count.value
    finally:
        nvml.nvmlShutdown()


def torch_build() -> tuple[str, str]:
    """torch's version and the CUDA version that it was built for, or "", read from its files."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "", ""
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return "", ""
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    built = re.search(r"^cuda[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return version.group(1) if version else "", built.group(1) if built else ""
