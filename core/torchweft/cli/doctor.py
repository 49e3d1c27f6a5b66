"""``torchweft doctor``: what is here, and what is wrong with it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase

import click

from torchweft import __version__
from torchweft.cli import write_json, write_rows
from torchweft.cli.checks import CHECKS, Finding
from torchweft.cli.facts import Computer, Device, Facts, Torch, gather

__all__ = ["doctor"]

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
    facts = gather(os.environ)
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
    sections = {
        "Versions": list(_version_rows(facts)),
        "Devices": [(device.accelerator, _describe(device)) for device in facts.devices]
        or [("", "no plugin provides an accelerator")],
        "Computer": _computer_rows(facts.computer),
        "Collectives": _collective_rows(facts.torch),
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


def _version_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    for name, version in _versions(facts).items():
        yield name, version or "cannot be imported, see below"
        if name == "torch" and version:
            built_for = ", ".join(f"{what} {v}" for what, v in facts.torch.built_for.items())
            yield "  built for", built_for or "the processor alone"


def _describe(device: Device) -> str:
    if not device.available:
        return "; ".join(filter(None, (f"not available: {device.reason}", device.hint)))
    plural = "" if device.count == 1 else "s"
    count = "" if device.count is None else f", {device.count} device{plural}"
    names = f": {', '.join(device.names)}" if device.names else ""
    trouble = "; torch cannot use them, see below" if device.error else ""
    return f"available{count}{names}{trouble}"


def _collective_rows(torch: Torch) -> list[tuple[str, str]]:
    if torch.error:
        return [("", "torch cannot be imported, see below")]
    rows = [(name, "yes" if there else "no") for name, there in torch.collectives.items()]
    return rows or [("", "torch.distributed is not in this torch")]


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
