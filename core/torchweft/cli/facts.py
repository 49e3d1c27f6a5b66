"""What ``torchweft doctor`` knows of this computer, gathered once."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchweft.catalog import Catalog, probe
from torchweft.detection import detect
from torchweft.errors import InvalidRequest, TorchweftError
from torchweft.manager import Manager
from torchweft.request import RunRequest
from torchweft.resolve import resolve
from torchweft.specs import KINDS, Availability, load_target

__all__ = ["READ_BY_MANAGER", "Computer", "Device", "Driver", "Facts", "Torch", "gather"]

#: Variables without which the plugins can be loaded when one of them cannot be used.
READ_BY_MANAGER = ("TORCHWEFT_DISABLE_PLUGINS", "TORCHWEFT_TRACE")

#: Libraries inside torch that have a version of their own.
_LIBRARIES = {"NCCL": "torch.cuda.nccl:version"}

#: Seconds that a look-up of this computer's own name may take.
_LOOK_UP = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """A driver of devices, and what has to be installed to use them.

    Attributes:
        maker: whose devices they are.
        sign: a path that exists where the driver is loaded.
        build: what ``torch.version`` names when torch was built for it.
        accelerator: that uses the devices.
    """

    maker: str
    sign: str
    build: str
    accelerator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """The installed torch, or ``error``: why it cannot be imported.

    ``built_for`` holds what ``torch.version`` names beside the version itself, such as the CUDA
    release; ``libraries`` the versions of libraries inside it; ``collectives`` whether each
    backend of ``torch.distributed`` is there.
    """

    version: str = ""
    error: str = ""
    built_for: Mapping[str, str] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    collectives: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An accelerator's devices here. ``error`` is torch's, where the probe promised devices."""

    accelerator: str
    provider: str
    available: bool
    reason: str = ""
    hint: str = ""
    count: int | None = None
    names: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """What is installed and cannot be used here, as its probe says; devices are apart."""

    kind: str
    name: str
    provider: str
    reason: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Computer:
    """Cores and memory (bytes) that this process may use, and its own name on the network.

    ``cpu_limit`` (cores) and ``memory_limit`` are those of a container; None where there is none.
    ``host_error`` says why the name does not resolve.
    """

    cores: int
    cores_usable: int
    cpu_limit: float | None = None
    memory: int
    memory_limit: int | None = None
    shared_memory: int | None = None
    host: str
    host_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that the checks look at.

    Attributes:
        environ: the whole environment.
        catalog: what is installed.
        unusable: specs of other kinds than accelerators that cannot be used here.
        failing: sentences about specs that are declared and cannot be loaded.
        drivers: those that are loaded on this computer.
        plan: what ``Fabric()`` without arguments would be; ``plan_error`` why it fails.
        writes_bytecode: whether Python keeps what it compiles.
    """

    environ: Mapping[str, str]
    catalog: Catalog
    torch: Torch
    computer: Computer
    devices: tuple[Device, ...] = ()
    unusable: tuple[Unusable, ...] = ()
    failing: tuple[str, ...] = ()
    drivers: tuple[Driver, ...] = ()
    plan: str = ""
    plan_error: str = ""
    writes_bytecode: bool = True


#: Those that are looked for.
_DRIVERS = (
    Driver(maker="NVIDIA", sign="/proc/driver/nvidia/version", build="cuda", accelerator="cuda"),
)


def gather(environ: Mapping[str, str]) -> Facts:
    """Look at this computer once. What fails is kept as a fact; nothing is raised."""
    try:
        manager = Manager.from_entry_points(environ)
        unusable = ""
    except InvalidRequest as error:
        # A finding like any other, and not the end of the search.
        unusable = str(error)
        kept = {name: v for name, v in environ.items() if name not in READ_BY_MANAGER}
        manager = Manager.from_entry_points(kept)
    catalog = Catalog(manager.declared)
    torch = _torch()
    plan, plan_error = ("", unusable) if unusable else _plan(environ, manager, catalog)
    return Facts(
        environ=environ,
        catalog=catalog,
        torch=torch,
        computer=_computer(),
        devices=tuple(_devices(catalog, torch)),
        unusable=tuple(_unusable(catalog)),
        failing=tuple(_failing(catalog, environ)) if torch.version else (),
        drivers=tuple(driver for driver in _DRIVERS if Path(driver.sign).exists()),
        plan=plan,
        plan_error=plan_error,
        writes_bytecode=not sys.dont_write_bytecode,
    )


def _torch() -> Torch:
    try:
        import torch
        import torch.distributed as distributed
        import torch.version as build
    except Exception as error:  # a broken installation fails in many ways
        return Torch(error=f"{type(error).__name__}: {error}")
    # torch answers for each backend by a function of its own.
    answers = {
        match[1]: getattr(distributed, match[0])
        for match in map(re.compile("is_(.+)_available").fullmatch, dir(distributed))
        if match and match[1] != "backend"
    }
    built_for = {
        name: value
        for name, value in vars(build).items()
        if isinstance(value, str) and not name.startswith("_") and name != "git_version"
    }
    return Torch(
        version=str(torch.__version__),
        built_for=built_for,
        libraries=dict(_libraries()),
        collectives={name: bool(answer()) for name, answer in answers.items()},
    )


def _libraries() -> Iterator[tuple[str, str]]:
    for name, target in _LIBRARIES.items():
        try:
            version: Any = load_target(target, "torch")()
        except Exception:  # a build of torch without it
            continue
        yield name, ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _devices(catalog: Catalog, torch: Torch) -> Iterator[Device]:
    for entry in catalog.entries("accelerator"):
        spec: Any = entry.spec
        answer = probe(entry)
        names: tuple[str, ...] = ()
        error = ""
        if answer.ok and answer.count and torch.version:
            try:
                names = _names(spec.device, answer.count)
            except Exception as failure:  # the driver's errors come in all types
                error = f"{type(failure).__name__}: {failure}"
        yield Device(
            accelerator=spec.name,
            provider=entry.provider,
            available=answer.ok,
            reason=answer.reason,
            hint=answer.hint,
            count=answer.count,
            names=names,
            error=error,
        )


def _names(device: str, count: int) -> tuple[str, ...]:
    """What torch calls the devices; nothing where it has no names for them."""
    try:
        module = importlib.import_module(f"torch.{device}")
        name: Callable[[int], str] = module.get_device_name
    except (ImportError, AttributeError):
        return ()
    return tuple(name(index) for index in range(count))


def _unusable(catalog: Catalog) -> Iterator[Unusable]:
    for kind in KINDS:
        for entry in catalog.entries(kind) if kind != "accelerator" else ():
            answer = Availability(ok=True)
            # A probe that fails is told with all else that does.
            with contextlib.suppress(Exception, SystemExit):
                if entry.spec.probe:
                    answer = load_target(entry.spec.probe, entry.provider)()
            if not answer.ok:
                yield Unusable(
                    kind=kind,
                    name=entry.spec.name,
                    provider=entry.provider,
                    reason=answer.reason,
                    hint=answer.hint,
                )


def _failing(catalog: Catalog, environ: Mapping[str, str]) -> Iterator[str]:
    """Probes and detections that fail, and targets of available specs that cannot be loaded."""
    for kind in KINDS:
        for entry in catalog.entries(kind):
            try:
                if entry.spec.probe and not load_target(entry.spec.probe, entry.provider)().ok:
                    continue
            except (Exception, SystemExit):
                yield f"{kind} '{entry.spec.name}': {probe(entry).reason}"
                continue
            try:
                load_target(entry.spec.target, entry.provider)
            except TorchweftError as error:
                yield f"{kind} '{entry.spec.name}': {error}"
    with contextlib.suppress(TorchweftError):  # the plan says the same
        yield from (f"launcher {r.sentence()}" for r in detect(catalog, environ, None).failed)


def _plan(environ: Mapping[str, str], manager: Manager, catalog: Catalog) -> tuple[str, str]:
    try:
        request = RunRequest().with_environment(environ, catalog)
        decided = resolve(request, catalog, environ=environ, objections=manager.objections)
    except TorchweftError as error:
        return "", str(error)
    return decided.summary(), ""


def _computer() -> Computer:
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        usable = os.cpu_count() or 1
    cpu_limit, memory_limit = _limits(Path("/"))
    try:
        shared = os.statvfs("/dev/shm")
        shared_memory = shared.f_frsize * shared.f_blocks
    except OSError:
        shared_memory = None
    host = socket.gethostname()
    return Computer(
        cores=os.cpu_count() or 1,
        cores_usable=usable,
        cpu_limit=cpu_limit,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_limit=memory_limit,
        shared_memory=shared_memory,
        host=host,
        host_error=_host_error(host, socket.getaddrinfo),
    )


def _limits(root: Path) -> tuple[float | None, int | None]:
    """The cores and bytes that the control groups (version 1 or 2) of this process allow."""
    cpus, memory = [], []
    for folder in _control_groups(root):
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        # "max" and -1 mean that there is no limit.
        if len(words) == 2 and words[0].isdigit():
            cpus.append(int(words[0]) / int(words[1]))
        words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        # Version 1 writes the largest number of pages for none.
        if words and words[0].isdigit() and int(words[0]) < 1 << 60:
            memory.append(int(words[0]))
    return min(cpus, default=None), min(memory, default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            # A limit may be set on any group above; a container may see only the top.
            mount = root / "sys/fs/cgroup" / controller
            mine = mount / path.lstrip("/")
            yield mine
            yield from (folder for folder in mine.parents if folder.is_relative_to(mount))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _host_error(host: str, look_up: Callable[[str, None], object]) -> str:
    """Why ``host`` does not resolve; a name server that never answers counts as no."""
    answers: list[str] = []

    def ask() -> None:
        try:
            look_up(host, None)
            answers.append("")
        except OSError as error:
            answers.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_LOOK_UP)
    return answers[0] if answers else f"no answer in {_LOOK_UP:g} s"
