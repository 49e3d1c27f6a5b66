"""``torchweft doctor``: what is here, and what is wrong with it.

Facts are gathered once; every check is a function of the facts, and ends in what to do.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from torchweft import __version__
from torchweft.catalog import Catalog, probe
from torchweft.cli import write_json, write_rows
from torchweft.detection import detect
from torchweft.discovery import canonical
from torchweft.errors import InvalidRequest, TorchweftError
from torchweft.handoff import VARIABLE, Handoff
from torchweft.known import KNOWN
from torchweft.manager import Manager
from torchweft.missing import clashing
from torchweft.request import RunRequest
from torchweft.resolve import resolve
from torchweft.specs import KINDS, load_target

__all__ = ["CHECKS", "Computer", "Device", "Facts", "Finding", "Torch", "doctor"]

#: Variables that change a run. No others are shown: an environment may hold secrets.
_RELEVANT = (
    "TORCHWEFT_*",
    "*_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "NCCL_*",
    "GLOO_*",
    "PYTHONDONTWRITEBYTECODE",
)

#: Variables without which the plugins can be loaded when one of them cannot be used.
_READ_BY_MANAGER = ("TORCHWEFT_DISABLE_PLUGINS", "TORCHWEFT_TRACE")

#: Libraries inside torch that have a version of their own.
_LIBRARIES = {"NCCL": "torch.cuda.nccl:version"}

#: The oldest torch that is supported.
_OLDEST_TORCH = (2, 9)

#: Seconds that a look-up of this computer's own name may take.
_LOOK_UP = 3.0

#: Below this many bytes of shared memory, workers of a ``DataLoader`` die of bus errors.
_SHARED_MEMORY = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Driver:
    """A driver of devices: a sign of it, and what has to be installed to use them."""

    maker: str
    sign: str
    build: str
    accelerator: str


_DRIVERS = (
    _Driver(maker="NVIDIA", sign="/proc/driver/nvidia/version", build="cuda", accelerator="cuda"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something wrong: ``broken`` fails the command, anything else is worth knowing."""

    broken: bool
    message: str
    hint: str


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
        failing: sentences about specs that are declared and cannot be loaded.
        drivers: makers whose driver is on this computer.
        plan: what ``Fabric()`` without arguments would be; ``plan_error`` why it fails.
        writes_bytecode: whether Python keeps what it compiles.
    """

    environ: Mapping[str, str]
    catalog: Catalog
    torch: Torch
    computer: Computer
    devices: tuple[Device, ...] = ()
    failing: tuple[str, ...] = ()
    drivers: tuple[str, ...] = ()
    plan: str = ""
    plan_error: str = ""
    writes_bytecode: bool = True


# -- the command -------------------------------------------------------------------------------


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show versions, devices, cores, memory, collective backends and the variables that matter,
    and what is known to be wrong with them. The exit status is 1 when something is broken.

    With --json one object is printed; memory is in bytes:

    \b
    {"versions": {name: version}, "torch_built_for": {name: version},
     "devices": [{"accelerator", "provider", "available", "reason", "hint",
                  "count", "names", "error"}],
     "computer": {"cores", "cores_usable", "cpu_limit", "memory",
                  "memory_limit", "shared_memory", "host", "host_error"},
     "collectives": {backend: bool}, "environment": {variable: value},
     "plan": "what Fabric() without arguments would be",
     "findings": [{"broken", "message", "hint"}]}
    """
    facts = _gather(os.environ)
    findings = [finding for check in CHECKS for finding in check(facts)]
    if as_json:
        write_json(_document(facts, findings))
    else:
        _write(facts, findings)
    ctx.exit(1 if any(finding.broken for finding in findings) else 0)


def _versions(facts: Facts) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": facts.torch.version,
        "torchweft": __version__,
        **facts.torch.libraries,
    } | {p.distribution: p.version for p in facts.catalog.declared if p.distribution != "torchweft"}


def _environment(facts: Facts) -> dict[str, str]:
    return {
        name: facts.environ[name]
        for name in sorted(facts.environ)
        if any(fnmatchcase(name, pattern) for pattern in _RELEVANT)
    }


def _document(facts: Facts, findings: list[Finding]) -> dict[str, object]:
    return {
        "versions": _versions(facts),
        "torch_built_for": facts.torch.built_for,
        "devices": [asdict(device) for device in facts.devices],
        "computer": asdict(facts.computer),
        "collectives": facts.torch.collectives,
        "environment": _environment(facts),
        "plan": facts.plan,
        "findings": [asdict(finding) for finding in findings],
    }


def _write(facts: Facts, findings: list[Finding]) -> None:
    built_for = ", ".join(f"{name} {v}" for name, v in facts.torch.built_for.items())
    versions = [
        (name, version or "cannot be imported") for name, version in _versions(facts).items()
    ]
    versions.insert(3, ("  built for", built_for or "the processor alone"))
    collectives = facts.torch.collectives.items()
    sections = {
        "Versions": versions,
        "Devices": [(device.accelerator, _describe(device)) for device in facts.devices],
        "Computer": _computer_rows(facts.computer),
        "Collectives": [(name, "yes" if there else "no") for name, there in collectives]
        or [("", "torch.distributed is not in this torch")],
        "Environment": list(_environment(facts).items()) or [("", "nothing set that matters")],
        "Plan": [("Fabric()", facts.plan or "fails, see below")],
    }
    width = max(len(label) for rows in sections.values() for label, _ in rows) + 4
    for title, rows in sections.items():
        click.secho(title, bold=True, fg="cyan")
        write_rows(((f"  {label}", text) for label, text in rows), width=width)
        click.echo()
    click.secho("Findings", bold=True, fg="cyan")
    if not findings:
        click.secho("  nothing is wrong", fg="green")
    for finding in findings:
        label = "  broken" if finding.broken else "  warning"
        write_rows(
            [(label, finding.message), ("", f"what to do: {finding.hint}")],
            width=len("  warning  "),
        )


def _describe(device: Device) -> str:
    if not device.available:
        return "; ".join(filter(None, (f"not available: {device.reason}", device.hint)))
    count = "" if device.count is None else f", {device.count} device(s)"
    return f"available{count}" + (f": {', '.join(device.names)}" if device.names else "")


def _computer_rows(computer: Computer) -> list[tuple[str, str]]:
    cores = f"{computer.cores_usable} of {computer.cores} usable"
    if computer.cpu_limit is not None:
        cores += f", limited to the time of {computer.cpu_limit:g}"
    memory = _size(computer.memory)
    if computer.memory_limit is not None:
        memory += f", limited to {_size(computer.memory_limit)}"
    rows = [("cores", cores), ("memory", memory)]
    if computer.shared_memory is not None:
        rows.append(("shared memory", _size(computer.shared_memory)))
    return [*rows, ("host name", computer.host)]


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"


# -- gathering ---------------------------------------------------------------------------------


def _gather(environ: Mapping[str, str]) -> Facts:
    try:
        manager = Manager.from_entry_points(environ)
        unusable = ""
    except InvalidRequest as error:
        # A finding like any other, and not the end of the search.
        unusable = str(error)
        kept = {name: v for name, v in environ.items() if name not in _READ_BY_MANAGER}
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
        failing=tuple(_failing(catalog, environ)) if torch.version else (),
        drivers=tuple(driver.maker for driver in _DRIVERS if Path(driver.sign).exists()),
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


# -- checks ------------------------------------------------------------------------------------


def _check_torch(facts: Facts) -> Iterator[Finding]:
    if facts.torch.error:
        yield Finding(
            broken=True,
            message=f"torch cannot be imported: {facts.torch.error}",
            hint="reinstall it: pip install --force-reinstall torch",
        )
        return
    release = tuple(int(part) for part in facts.torch.version.split(".")[:2])
    if release < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        yield Finding(
            broken=True,
            message=f"torch {facts.torch.version} is older than torchweft supports",
            hint=f"pip install 'torch>={oldest}'",
        )


def _check_plugins(facts: Facts) -> Iterator[Finding]:
    for plugin in facts.catalog.broken:
        yield Finding(
            broken=True,
            message=plugin.failure,
            hint=f"upgrade or uninstall {plugin.distribution}, or set "
            f"TORCHWEFT_DISABLE_PLUGINS={plugin.plugin}; TORCHWEFT_TRACE=1 torchweft plugins "
            "prints the traceback",
        )
    for sentence in facts.failing:
        yield Finding(
            broken=True,
            message=sentence,
            hint="upgrade the package that declares it, or report this to its authors",
        )


def _check_clashes(facts: Facts) -> Iterator[Finding]:
    for kind in KINDS:
        for name in facts.catalog.names(kind):
            pair = facts.catalog.clash(kind, name)
            if pair is not None:
                message, _, hint = str(clashing(kind, name, pair)).partition("; ")
                yield Finding(broken=True, message=message, hint=hint)


def _check_versions(facts: Facts) -> Iterator[Finding]:
    """Plugins of the same family are released together; others have versions of their own."""
    series = __version__.split(".")[:2]
    family = {"torchweft", *KNOWN.values()}
    for name, version in sorted({(p.distribution, p.version) for p in facts.catalog.declared}):
        if canonical(name) in family and version.split(".")[:2] != series:
            yield Finding(
                broken=True,
                message=f"{name} {version} does not belong to the torchweft {__version__} that is "
                "imported",
                hint=f"pip install '{name}=={'.'.join(series)}.*'",
            )


def _check_devices(facts: Facts) -> Iterator[Finding]:
    for device in facts.devices:
        if device.error:
            yield Finding(
                broken=True,
                message=f"accelerator '{device.accelerator}' ({device.provider}) should have "
                f"{device.count} device(s), but torch {facts.torch.version} cannot use them: "
                f"{device.error}",
                hint="install the build of torch that fits the driver, or update the driver",
            )


def _check_drivers(facts: Facts) -> Iterator[Finding]:
    for driver in _DRIVERS:
        if driver.maker not in facts.drivers or not facts.torch.version:
            continue
        if driver.build not in facts.torch.built_for:
            yield Finding(
                broken=False,
                message=f"there is a driver of {driver.maker} here, but torch "
                f"{facts.torch.version} was built without {driver.build}, so that none of "
                "its devices can be used",
                hint="install a build of torch for the driver, see "
                "https://pytorch.org/get-started/locally",
            )
        elif not facts.catalog.named("accelerator", driver.accelerator):
            yield Finding(
                broken=False,
                message=f"there is a driver of {driver.maker} here, but no installed plugin "
                f"provides accelerator '{driver.accelerator}'",
                hint=f"pip install {KNOWN['accelerator', driver.accelerator]}",
            )


def _check_plan(facts: Facts) -> Iterator[Finding]:
    if facts.plan_error:
        names = (*_READ_BY_MANAGER, "TORCHWEFT_LAUNCHER", VARIABLE)
        guilty = [name for name in names if facts.environ.get(name)]
        yield Finding(
            broken=True,
            message=f"Fabric() without arguments fails here: {facts.plan_error}",
            hint=f"unset {', '.join(guilty)}, unless it is meant"
            if guilty
            else "follow the sentence, or see 'torchweft plugins' for what there is",
        )
        return
    if Handoff.stale(facts.environ):
        yield Finding(
            broken=False,
            message=f"{VARIABLE} is set, but was left by a run that this process does not belong "
            "to; it changes nothing",
            hint=f"unset {VARIABLE}",
        )


def _check_bytecode(facts: Facts) -> Iterator[Finding]:
    if not facts.writes_bytecode:
        yield Finding(
            broken=False,
            message="Python does not keep what it compiles here, so that every rank may have to "
            "compile all that it imports: starts are slow",
            hint="unset PYTHONDONTWRITEBYTECODE, and start Python without -B",
        )


def _check_threads(facts: Facts) -> Iterator[Finding]:
    computer = facts.computer
    limit = computer.cpu_limit
    if limit and limit < computer.cores_usable and "OMP_NUM_THREADS" not in facts.environ:
        yield Finding(
            broken=False,
            message=f"this container may use the time of {limit:g} cores, but torch sees "
            f"{computer.cores_usable} and starts as many threads",
            hint=f"set OMP_NUM_THREADS={max(1, int(limit))}, divided by the processes of a run",
        )


def _check_memory(facts: Facts) -> Iterator[Finding]:
    shared = facts.computer.shared_memory
    if shared is not None and shared < _SHARED_MEMORY:
        yield Finding(
            broken=False,
            message=f"/dev/shm has {shared >> 20} MiB, through which DataLoader workers pass "
            "batches; they die of a bus error when it is full",
            hint="start the container with more (docker run --shm-size=8g), or use num_workers=0",
        )


def _check_host(facts: Facts) -> Iterator[Finding]:
    if facts.computer.host_error:
        yield Finding(
            broken=False,
            message=f"this computer's name '{facts.computer.host}' does not resolve "
            f"({facts.computer.host_error}); runs on several nodes cannot meet here by name",
            hint=f"add '{facts.computer.host}' to /etc/hosts, or give an address with "
            "--main-address",
        )


#: In the order in which findings are read: what prevents every run first.
CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _check_torch,
    _check_plugins,
    _check_clashes,
    _check_versions,
    _check_devices,
    _check_plan,
    _check_drivers,
    _check_bytecode,
    _check_threads,
    _check_memory,
    _check_host,
)
