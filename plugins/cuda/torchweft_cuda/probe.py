"""Whether NVIDIA GPUs can be used here, found out without torch and without waking a device."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from pathlib import Path

from torchweft.specs import Availability

__all__ = ["cuda", "torch_build", "visible"]

_LIBRARY = "libnvidia-ml.so.1"
_PROC = Path("/proc/driver/nvidia/gpus")


def cuda() -> Availability:
    """GPUs that the driver shows and ``CUDA_VISIBLE_DEVICES`` leaves."""
    present, problem = driver_count()
    if present is None:
        return Availability(
            ok=False,
            reason=f"no NVIDIA driver answers ({problem})",
            hint="install NVIDIA's driver, or use accelerator='cpu'",
        )
    if present == 0:
        return Availability(
            ok=False,
            reason=problem or "the NVIDIA driver reports no GPU",
            hint="check nvidia-smi, or use accelerator='cpu'",
        )
    version, built_for = torch_build()
    if not built_for:
        return Availability(
            ok=False,
            reason=f"this computer has {present} NVIDIA GPU(s), but torch {version} was built "
            "without CUDA",
            hint="install a CUDA build of torch: pip install --force-reinstall torch",
        )
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = visible(present, setting)
    if count == 0:
        return Availability(
            ok=False,
            reason=f"CUDA_VISIBLE_DEVICES='{setting}' hides all {present} GPU(s)",
            hint="unset CUDA_VISIBLE_DEVICES, or list the GPUs to use",
        )
    return Availability(ok=True, count=count)


def visible(present: int, setting: str | None) -> int:
    """How many of ``present`` GPUs a value of ``CUDA_VISIBLE_DEVICES`` leaves.

    As the driver reads it: the list ends at the first entry that is not a GPU, or is not of the
    same form as the first, and an entry that occurs twice hides all. Names (``GPU-…``, ``MIG-…``)
    are counted as they stand.
    """
    if setting is None:
        return present
    entries = [entry.strip() for entry in setting.split(",")]
    prefix = next((p for p in ("GPU-", "MIG-") if entries[0].startswith(p)), None)
    seen: list[str] = []
    for entry in entries:
        if prefix is not None:
            name = entry if entry.startswith(prefix) else None
        else:
            number = re.match(r"\+?(\d+)", entry)
            name = str(int(number[1])) if number and int(number[1]) < present else None
        if name is None:
            break
        if name in seen:
            return 0
        seen.append(name)
    return len(seen)


def driver_count() -> tuple[int | None, str]:
    """GPUs by NVIDIA's management library, which starts no context, and what is the matter.

    None without a driver; 0 where there is one that does not work.
    """
    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        # In some containers only the driver's files are there.
        if _PROC.is_dir():
            return len(list(_PROC.iterdir())), ""
        return None, f"{_LIBRARY} was not found"
    code = nvml.nvmlInit_v2()
    if code != 0:
        return 0, f"the NVIDIA driver does not work: {_words(nvml, code)}"
    try:
        count = ctypes.c_uint()
        code = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        if code != 0:
            return 0, f"the NVIDIA driver does not work: {_words(nvml, code)}"
        return count.value, ""
    finally:
        nvml.nvmlShutdown()


def _words(nvml: ctypes.CDLL, code: int) -> str:
    """NVIDIA's own words for an error, such as a driver that was updated under a running kernel."""
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    text = nvml.nvmlErrorString(code)
    return text.decode(errors="replace") if text else f"error {code}"


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
