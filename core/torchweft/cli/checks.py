"""The known mismatches: every check is a function of the facts, and ends in what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torchweft import __version__
from torchweft.cli.facts import READ_BY_MANAGER, Facts
from torchweft.discovery import canonical
from torchweft.handoff import VARIABLE, Handoff
from torchweft.known import KNOWN
from torchweft.missing import clashing
from torchweft.specs import KINDS

__all__ = ["CHECKS", "Finding"]

#: The oldest torch that is supported.
_OLDEST_TORCH = (2, 9)

#: Below this many bytes of shared memory, workers of a ``DataLoader`` die of bus errors.
_SHARED_MEMORY = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something wrong: ``broken`` fails the command, anything else is worth knowing."""

    broken: bool
    message: str
    hint: str


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


def _check_probes(facts: Facts) -> Iterator[Finding]:
    for found in facts.unusable:
        yield Finding(
            broken=False,
            message=f"{found.kind} '{found.name}' ({found.provider}) cannot be used here: "
            f"{found.reason}",
            hint=found.hint or f"see the documentation of {found.provider}",
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
    for driver in facts.drivers if facts.torch.version else ():
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
        names = (*READ_BY_MANAGER, "TORCHWEFT_LAUNCHER", VARIABLE)
        guilty = [name for name in names if facts.environ.get(name)]
        yield Finding(
            broken=True,
            message=f"Fabric() without arguments fails here: {facts.plan_error}",
            hint=f"unset {' or '.join(guilty)}, unless it is meant"
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
    _check_probes,
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
