"""What the probe says, without importing torch-xla or torch."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from torchweft.specs import Availability
from torchweft_xla import probe


def said(**environ: str) -> Availability:
    return probe._devices(environ)


def test_it_imports_neither_library(fresh_interpreter) -> None:
    code = (
        "import sys; from torchweft_xla.probe import xla; found = xla(); "
        "assert found.ok and found.count == 3, found; "
        "print(sorted({'torch', 'torch_xla', 'numpy'} & set(sys.modules)))"
    )
    done = fresh_interpreter(code, environ={"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "3"})
    assert (done.status, done.out) == (0, "[]\n"), done.err


def test_without_torch_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)
    assert probe.xla() == Availability(
        ok=False,
        reason="the package torch-xla is not installed",
        hint="pip install torch==2.9.0 torch-xla==2.9.0, in an environment of its own",
    )


def test_beside_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cu130", "torch-xla": "2.9.0"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    assert probe.xla() == Availability(
        ok=False,
        reason="torch-xla 2.9.0 is made for torch 2.9.0, and torch 2.13.0 is installed: importing "
        "it would end in an undefined symbol",
        hint="pip install torch==2.9.0 torch-xla==2.9.0, in an environment of its own",
    )


@pytest.mark.parametrize("torch", ["2.9.0", "2.9.0+cpu", "2.9.0+cu128"])
def test_beside_any_build_of_its_torch(torch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": torch, "torch-xla": "2.9.0"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    assert probe.xla().ok


@pytest.mark.parametrize("client", ["GPU", "cpu", "NEURON"])
def test_an_unknown_client(client: str) -> None:
    assert said(PJRT_DEVICE=client) == Availability(
        ok=False,
        reason=f"PJRT_DEVICE='{client}' is no client of XLA that this package serves",
        hint="set PJRT_DEVICE to TPU or CPU, or leave it out where there is a TPU",
    )


def test_the_processor() -> None:
    assert said(PJRT_DEVICE="CPU") == Availability(ok=True, count=1)
    assert said(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4") == Availability(ok=True, count=4)


@pytest.mark.parametrize("count", ["0", "-1", "two", ""])
def test_a_number_of_devices_that_is_none(count: str) -> None:
    assert said(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=count) == Availability(
        ok=False,
        reason=f"CPU_NUM_DEVICES='{count}' is no number of devices",
        hint="set CPU_NUM_DEVICES to 1 or more, or leave it out",
    )


def bus(folder: Path, *chips: tuple[str, str]) -> Path:
    """What the kernel shows of a PCI bus; there is no TPU here."""
    for i, (vendor, device) in enumerate(chips):
        place = folder / f"0000:00:{i:02x}.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text(vendor + "\n")
        (place / "device").write_text(device + "\n")
    return folder


@pytest.mark.parametrize(
    ("device", "count"),
    [("0x0027", 8), ("0x005e", 4), ("0x0062", 4), ("0x0063", 4), ("0x006f", 4), ("0x0076", 8)],
)
def test_four_chips(
    device: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [("0x8086", device), ("0x1ae0", "0x0042")]
    monkeypatch.setattr(probe, "_PCI", bus(tmp_path, *others, *[("0x1ae0", device)] * 4))
    assert said() == said(PJRT_DEVICE="TPU") == Availability(ok=True, count=count)
    assert said(TPU_VISIBLE_CHIPS="0,1") == Availability(ok=True, count=count // 2)


def test_no_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_PCI", bus(tmp_path, ("0x8086", "0x0027")))
    assert said() == Availability(
        ok=False,
        reason="there is no TPU on this computer's PCI bus",
        hint="run on a TPU VM, or set PJRT_DEVICE=CPU for XLA on the processor "
        "(CPU_NUM_DEVICES=4 makes it four devices)",
    )
