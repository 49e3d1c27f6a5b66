"""Whether GPUs can be used, and why not, without torch and without waking one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchweft_cuda import probe


def answer(monkeypatch, *, driver, build=("2.13.0+cu130", "13.0"), setting=None):
    problem = "libnvidia-ml.so.1 was not found" if driver is None else ""
    monkeypatch.setattr(probe, "driver_count", lambda: (driver, problem))
    monkeypatch.setattr(probe, "torch_build", lambda: build)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    return probe.cuda()


def test_no_driver(monkeypatch) -> None:
    said = answer(monkeypatch, driver=None)
    assert not said.ok
    assert said.reason == "no NVIDIA driver answers (libnvidia-ml.so.1 was not found)"
    assert said.hint == "install NVIDIA's driver, or use accelerator='cpu'"


def test_no_gpu(monkeypatch) -> None:
    said = answer(monkeypatch, driver=0)
    assert not said.ok
    assert said.reason == "the NVIDIA driver reports no GPU"


def test_a_cpu_build_of_torch_beside_a_gpu(monkeypatch) -> None:
    said = answer(monkeypatch, driver=2, build=("2.13.0+cpu", ""))
    assert not said.ok
    assert said.reason == (
        "this computer has 2 NVIDIA GPU(s), but torch 2.13.0+cpu was built without CUDA"
    )
    assert "pip install" in said.hint


def test_all_hidden(monkeypatch) -> None:
    said = answer(monkeypatch, driver=2, setting="")
    assert not said.ok
    assert said.reason == "CUDA_VISIBLE_DEVICES='' hides all 2 GPU(s)"


def test_available(monkeypatch) -> None:
    said = answer(monkeypatch, driver=4, setting="0,2")
    assert (said.ok, said.count, said.reason) == (True, 2, "")


@pytest.mark.parametrize(
    ("setting", "count"),
    [
        (None, 4),
        ("0", 1),
        ("3,1", 2),
        ("0,9,1", 1),
        ("-1", 0),
        ("0,-1,2", 1),
        ("0,0", 0),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        (" 1 , 2 ", 2),
        ("none", 0),
    ],
)
def test_visible_devices_as_the_driver_reads_them(setting: str | None, count: int) -> None:
    assert probe.visible(4, setting) == count


@given(st.integers(0, 16), st.lists(st.integers(-2, 20), unique=True))
def test_visible_counts_up_to_the_first_that_is_not_there(present: int, chosen: list[int]) -> None:
    expected = 0
    for index in chosen:
        if not 0 <= index < present:
            break
        expected += 1
    assert probe.visible(present, ",".join(map(str, chosen))) == expected


def test_build_is_read_from_torch_without_importing_it() -> None:
    code = (
        "import sys\n"
        "from torchweft_cuda.probe import cuda, torch_build\n"
        "cuda()\n"
        "print(*torch_build(), sep='|')\n"
        "assert 'torch' not in sys.modules\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == f"{torch.__version__}|{torch.version.cuda or ''}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU here")
def test_agrees_with_torch() -> None:
    said = probe.cuda()
    assert said.ok, said.reason
    assert said.count == torch.cuda.device_count()
