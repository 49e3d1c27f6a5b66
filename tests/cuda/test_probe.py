"""Whether there are GPUs, found out from a driver that is made up, and from the real one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchweft_cuda import probe

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Driver:
    """NVIDIA's management library, as far as it is asked."""

    def __init__(self, count: int = 0, init: int = 0, counting: int = 0, text: bytes = b"") -> None:
        self._count, self._counting, self._init = count, counting, init
        self.open = 0

        def words(code: int) -> bytes | None:
            return text or None

        self.nvmlErrorString = words

    def nvmlInit_v2(self) -> int:
        self.open += self._init == 0
        return self._init

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = self._count
        return self._counting

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Sets what there is: a driver or None, the CUDA version of torch, the variable."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def has(driver: Driver | None, built: str = "12.8", setting: str | None = None) -> None:
        def load(name: str) -> Driver:
            if driver is None:
                raise OSError(f"{name}: cannot open shared object file")
            return driver

        monkeypatch.setattr(probe.ctypes, "CDLL", load)
        monkeypatch.setattr(probe, "_PROC", tmp_path / "gpus")
        monkeypatch.setattr(probe, "torch_build", lambda: ("2.13.0+cpu", built))
        if setting is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)

    return has


def test_gpus_are_counted_and_the_library_is_left(machine: Any) -> None:
    driver = Driver(count=4)
    machine(driver)
    answer = probe.cuda()
    assert (answer.ok, answer.count, answer.reason) == (True, 4, "")
    assert driver.open == 0


def test_no_driver(machine: Any) -> None:
    machine(None)
    answer = probe.cuda()
    assert not answer.ok
    assert answer.reason == "no NVIDIA driver answers (libnvidia-ml.so.1 was not found)"
    assert answer.hint == "install NVIDIA's driver, or use accelerator='cpu'"


def test_a_driver_without_its_library_is_counted_by_its_files(machine: Any, tmp_path: Path) -> None:
    machine(None)
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert probe.cuda().count == 1


def test_a_driver_that_does_not_work_says_why(machine: Any) -> None:
    machine(Driver(init=18, text=b"Driver/library version mismatch"))
    answer = probe.cuda()
    assert not answer.ok
    assert answer.reason == "the NVIDIA driver does not work: Driver/library version mismatch"
    driver = Driver(counting=999)
    machine(driver)
    assert probe.cuda().reason == "the NVIDIA driver does not work: error 999"
    assert driver.open == 0


def test_a_driver_without_gpus(machine: Any) -> None:
    machine(Driver(count=0))
    answer = probe.cuda()
    assert not answer.ok
    assert answer.reason == "the NVIDIA driver reports no GPU"


def test_a_cpu_build_of_torch_beside_a_gpu(machine: Any) -> None:
    machine(Driver(count=2), built="")
    answer = probe.cuda()
    assert not answer.ok
    assert answer.reason == (
        "this computer has 2 NVIDIA GPU(s), but torch 2.13.0+cpu was built without CUDA"
    )
    assert answer.hint == "install a CUDA build of torch: pip install --force-reinstall torch"


@pytest.mark.parametrize("setting", ["", "-1", "7", "1,1", "NoDevFiles"])
def test_hidden_gpus(machine: Any, setting: str) -> None:
    machine(Driver(count=2), setting=setting)
    answer = probe.cuda()
    assert not answer.ok
    assert answer.reason == f"CUDA_VISIBLE_DEVICES='{setting}' hides all 2 GPU(s)"
    assert answer.hint == "unset CUDA_VISIBLE_DEVICES, or list the GPUs to use"


@pytest.mark.parametrize(
    ("setting", "count"),
    [
        (None, 4),
        ("0", 1),
        (" 3 , 1 ", 2),
        ("+1,2", 2),
        ("0,1,9,2", 2),
        ("0,-1,2", 1),
        ("0,x,2", 1),
        ("0,2,0", 0),
        ("01,1", 0),
        ("GPU-8932f937,GPU-463b", 2),
        ("GPU-8932f937,GPU-8932f937", 0),
        ("GPU-8932f937,0", 1),
        ("0,GPU-8932f937", 1),
        ("MIG-1,MIG-2,GPU-3", 2),
        (",0", 0),
    ],
)
def test_what_the_variable_leaves(setting: str | None, count: int) -> None:
    assert probe.visible(4, setting) == count


@given(st.lists(st.integers(-2, 9), max_size=6), st.integers(0, 8))
def test_numbers_are_read_up_to_the_first_that_is_no_gpu(indices: list[int], present: int) -> None:
    kept: list[int] = []
    for index in indices:
        if not 0 <= index < present:
            break
        kept.append(index)
    expected = len(kept) if len(set(kept)) == len(kept) else 0
    assert probe.visible(present, ",".join(map(str, indices))) == expected


@given(st.text(), st.integers(0, 8))
def test_anything_may_stand_in_the_variable(setting: str, present: int) -> None:
    assert probe.visible(present, setting) >= 0


def test_the_build_of_torch_is_read_from_its_files() -> None:
    assert probe.torch_build() == (torch.__version__, torch.version.cuda or "")


def test_no_torch_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)
    assert probe.torch_build() == ("", "")


def test_probing_needs_no_torch_and_leaves_no_device_open() -> None:
    code = """
import os, sys
from torchweft_cuda.probe import cuda
cuda()
assert "torch" not in sys.modules
held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")]
print([name for name in held if name.startswith("/dev/nvidia")])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.gpu
@needs_gpu
def test_the_real_driver_counts_what_torch_counts() -> None:
    assert ctypes.CDLL(probe._LIBRARY)
    assert probe.cuda().count == torch.cuda.device_count()
