"""Declared backends that need no device, and real distributions on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from torchweft.catalog import Catalog, Entry
from torchweft.manager import Declared
from torchweft.plan import RunPlan
from torchweft.request import RunRequest
from torchweft.resolve import resolve
from torchweft.specs import (
    AcceleratorSpec,
    Availability,
    Detection,
    LauncherSpec,
    PrecisionSpec,
    Preset,
    Spec,
    StrategySpec,
)


class DDP:
    """Options like those of a real strategy, nothing behind them."""

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        bucket_cap_mb: int | None = None,
        static_graph: bool = False,
    ) -> None: ...


def _core() -> Declared:
    here = "example_backend"
    return Declared(
        plugin="builtin",
        distribution="torchweft",
        version="0.1.0",
        specs=(
            AcceleratorSpec(
                name="cpu", target=f"{here}:DDP", device="cpu", priority=0, selectable=False
            ),
            AcceleratorSpec(
                name="mps",
                target=f"{here}:DDP",
                device="mps",
                aliases=("gpu",),
                priority=50,
                probe=f"{here}:mps",
                selectable=False,
            ),
            StrategySpec(name="single_device", target=f"{here}:DDP", priority=100, processes="one"),
            PrecisionSpec(name="32-true", target=f"{here}:DDP", aliases=("32",), priority=100),
            PrecisionSpec(name="bf16-mixed", target=f"{here}:DDP", aliases=("bf16",)),
            LauncherSpec(name="inline", target=f"{here}:DDP", priority=100, processes="one"),
            LauncherSpec(name="script", target=f"{here}:DDP", priority=50, processes="many"),
            LauncherSpec(name="fork", target=f"{here}:DDP", function="required"),
            LauncherSpec(name="spawn", target=f"{here}:DDP", function="required"),
            LauncherSpec(
                name="torchrun",
                target=f"{here}:DDP",
                priority=200,
                detect=f"{here}:torchrun",
                nodes="any",
                outside=True,
            ),
        ),
    )


def _cuda() -> Declared:
    here = "example_backend"
    return Declared(
        plugin="cuda",
        distribution="torchweft-cuda",
        version="0.1.0",
        specs=(
            AcceleratorSpec(
                name="cuda",
                target=f"{here}:DDP",
                device="cuda",
                aliases=("gpu",),
                priority=100,
                probe=f"{here}:cuda",
                default_devices="all",
            ),
            StrategySpec(
                name="ddp",
                target=f"{here}:DDP",
                devices=("cuda", "cpu"),
                priority=50,
                presets=(
                    Preset(alias="ddp_spawn", launcher="spawn"),
                    Preset(
                        alias="ddp_find_unused_parameters_true",
                        options={"find_unused_parameters": True},
                    ),
                ),
            ),
            PrecisionSpec(
                name="16-mixed", target=f"{here}:DDP", aliases=("16",), strategies=("ddp",)
            ),
        ),
    )


@dataclass
class World:
    """What is installed and what a machine has, for one test.

    ``gpus``: how many the driver counts. ``outside``: what torchrun left behind, by process.
    """

    plugins: list[Declared] = field(default_factory=lambda: [_core(), _cuda()])
    gpus: int = 0
    mps: bool = False
    outside: Detection | None = None

    def declare(
        self, *specs: Spec, plugin: str = "acme", distribution: str = "torchweft-acme"
    ) -> None:
        """Add a plugin."""
        self.plugins.append(
            Declared(plugin=plugin, distribution=distribution, version="0.1", specs=specs)
        )

    def without(self, plugin: str) -> None:
        """Uninstall a plugin."""
        self.plugins = [declared for declared in self.plugins if declared.plugin != plugin]

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.plugins)

    def resolve(
        self,
        *,
        environ: Mapping[str, str] | None = None,
        given: Mapping[str, Entry] | None = None,
        objections: Callable[[RunPlan], list[str]] = lambda plan: [],
        **asked: Any,
    ) -> RunPlan:
        """What Fabric does with its arguments and the environment."""
        environ = environ or {}
        return resolve(
            RunRequest.parse(**asked).with_environment(environ, self.catalog),
            self.catalog,
            environ=environ,
            given=given,
            objections=objections,
        )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """The core and the CUDA plugin, on a machine without a GPU."""
    made = World()
    backend: Any = ModuleType("example_backend")
    backend.DDP = DDP
    backend.torchrun = lambda environ: made.outside
    backend.mps = lambda: Availability(ok=made.mps, reason="this is not an Apple computer")
    backend.cuda = lambda: Availability(
        ok=made.gpus > 0,
        count=made.gpus,
        reason="" if made.gpus else "there is no NVIDIA driver",
        hint="" if made.gpus else "install the driver",
    )
    monkeypatch.setitem(sys.modules, "example_backend", backend)
    return made


class Site:
    """A folder of real distributions for fresh interpreters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._work = folder.parent

    def install(
        self,
        distribution: str,
        hooks: str | None,
        *,
        version: str = "0.1",
        plugin: str = "acme",
        module: str = "acme_hooks",
        entry_points: str | None = None,
    ) -> None:
        """Write a distribution as an installer would; ``hooks`` is the source of its module."""
        if hooks is not None:
            (self.folder / f"{module}.py").write_text(textwrap.dedent(hooks))
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        if entry_points is None:
            entry_points = f"[torchweft]\n{plugin} = {module}\n"
        (info / "entry_points.txt").write_text(entry_points)

    def run(self, code: str, **environ: str) -> str:
        """What ``code`` prints in a fresh interpreter that sees these distributions."""
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH", "")]))
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONPATH": path, **environ},
            cwd=self._work,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty folder of distributions, beside those of the environment."""
    folder = tmp_path / "site"
    folder.mkdir()
    return Site(folder)
