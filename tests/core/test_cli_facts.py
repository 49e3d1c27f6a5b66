"""The facts of ``torchweft doctor``: control groups, names, devices, torch itself."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from torchweft.catalog import Catalog
from torchweft.cli import facts as module
from torchweft.cli.facts import Device, Torch
from torchweft.manager import Declared
from torchweft.specs import AcceleratorSpec, Availability


def control_group(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_control_groups_2_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    root = control_group(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/box/memory.max": "1073741824\n",
            "sys/fs/cgroup/pod/memory.max": "2147483648\n",
        },
    )
    assert module._limits(root) == (1.5, 1 << 30)


def test_limits_of_control_groups_1(tmp_path: Path) -> None:
    root = control_group(
        tmp_path,
        {
            # The path is the one outside the container, which does not exist inside.
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n1:name=x:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
        },
    )
    assert module._limits(root) == (2.0, 512 << 20)


def test_no_limits(tmp_path: Path) -> None:
    root = control_group(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu:/\n3:memory:/\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert module._limits(root) == (None, None)
    assert module._limits(tmp_path / "elsewhere") == (None, None)


def test_a_name_that_resolves_one_that_does_not_and_one_that_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(host: str, port: None) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    answer = threading.Event()
    monkeypatch.setattr(module, "_LOOK_UP", 0.01)
    assert module._host_error("here", lambda host, port: answer.wait()) == "no answer in 0.01 s"
    answer.set()
    monkeypatch.setattr(module, "_LOOK_UP", 60.0)
    assert module._host_error("here", lambda host, port: []) == ""
    assert module._host_error("here", unknown) == "[Errno -2] Name or service not known"


def counted(monkeypatch: pytest.MonkeyPatch, name: Callable[[int], str]) -> Device:
    """An accelerator whose probe promises two devices, which torch names by ``name``."""
    plugin, library = ModuleType("loom_plugin"), ModuleType("torch.loom")
    plugin.probe = lambda: Availability(ok=True, count=2)  # type: ignore[attr-defined]
    library.get_device_name = name  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loom_plugin", plugin)
    monkeypatch.setitem(sys.modules, "torch.loom", library)
    spec = AcceleratorSpec(name="loom", target="a:B", device="loom", probe="loom_plugin:probe")
    acme = Declared(plugin="acme", distribution="torchweft-acme", version="1.0", specs=(spec,))
    (device,) = module._devices(Catalog([acme]), Torch(version="2.13.0"))
    return device


def test_devices_are_called_what_torch_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device = counted(monkeypatch, lambda index: f"Jacquard {index}")
    assert (device.count, device.names) == (2, ("Jacquard 0", "Jacquard 1"))


def test_an_error_of_torch_about_a_device_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(index: int) -> str:
        raise RuntimeError("the driver is too old")

    device = counted(monkeypatch, fails)
    assert (device.names, device.error) == ((), "RuntimeError: the driver is too old")
