"""``torchweft plan``: what a run would be, decided without starting one."""

from __future__ import annotations

import os
from dataclasses import asdict, replace

import click

from torchweft.catalog import Catalog
from torchweft.cli import write_json, write_rows
from torchweft.manager import Manager
from torchweft.plan import RunPlan
from torchweft.request import RunRequest
from torchweft.resolve import resolve

__all__ = ["plan"]

#: The width of the column of labels in ``RunPlan.explain()``.
_LABEL = 12


@click.command()
@click.option("--accelerator", metavar="NAME", help="Kind of device, such as cpu.")
@click.option("--strategy", metavar="NAME", help="Such as ddp, or ddp:static_graph=true.")
@click.option("--devices", metavar="N", help="A number, indices such as 0,2, or all.")
@click.option("--num-nodes", metavar="N", help="A number, or LEAST:MOST.")
@click.option("--precision", metavar="NAME", help="Such as 32-true or bf16-mixed.")
@click.option("--launcher", metavar="NAME", help="Who makes the processes, such as spawn.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def plan(as_json: bool, **given: str | None) -> None:
    """Show what Fabric(...) with these arguments would decide here, why, and what it rejected.
    Nothing is started. What is left out is 'auto'.

    'torchweft plugins' lists the names. With --json one object is printed:

    \b
    {"summary", "accelerator", "strategy", "precision", "launcher",
     "topology": {"num_nodes", "processes_per_node", "devices", "world_size"},
     "options": {kind: {option: value}},
     "decisions": [{"kind", "wanted", "name", "provider", "why",
                    "rejected": [{"name", "provider", "reason", "hint"}]}],
     "notes": [sentence]}

    "num_nodes" is a number, or [least, most] for an elastic run; "hint" says what to do about a
    rejection, and may be empty; "notes" hold what else is worth knowing, such as a plugin that
    failed to load.
    """
    manager = Manager.from_entry_points(os.environ)
    catalog = Catalog(manager.declared)
    # An error that names what was asked for names the flag.
    flags = {name: f"--{name.replace('_', '-')}" for name, value in given.items() if value}
    request = replace(RunRequest.parse(**given), sources=flags)
    decided = resolve(
        request.with_environment(os.environ, catalog),
        catalog,
        environ=os.environ,
        objections=manager.objections,
    )
    if as_json:
        write_json(_document(decided))
        return
    click.secho(f"{decided.summary()}\n", bold=True)
    explained = decided.explain().splitlines()
    write_rows(
        ((line[:_LABEL].rstrip(), line[_LABEL:]) for line in explained),
        width=_LABEL,
    )


def _document(decided: RunPlan) -> dict[str, object]:
    return {
        "summary": decided.summary(),
        "accelerator": decided.accelerator.name,
        "strategy": decided.strategy.name,
        "precision": decided.precision.name,
        "launcher": decided.launcher.name,
        "topology": {**asdict(decided.topology), "world_size": decided.topology.world_size},
        "options": {kind: dict(options) for kind, options in decided.options.items()},
        "decisions": [
            {
                "kind": decision.kind,
                "wanted": decision.wanted,
                "name": decision.spec.name,
                "provider": decision.provider,
                "why": decision.why,
                "rejected": [asdict(rejected) for rejected in decision.rejected],
            }
            for decision in decided.decisions
        ],
        "notes": decided.notes,
    }
