"""``torchweft plan``: what a run would be, decided without starting one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace

import click

from torchweft.catalog import Catalog
from torchweft.cli import write_json, write_rows
from torchweft.cli.completion import name_option
from torchweft.errors import IncompatiblePlan
from torchweft.handoff import Handoff
from torchweft.manager import Manager
from torchweft.plan import RunPlan
from torchweft.rank import RankInfo
from torchweft.request import RunRequest
from torchweft.resolve import resolve

__all__ = ["plan"]

#: The width of the column of labels in ``RunPlan.explain()``.
_LABEL = 12


@click.command()
@name_option(
    "accelerator",
    metavar="NAME",
    help="Kind of device, such as cpu.",
)
@name_option(
    "strategy",
    metavar="NAME",
    help="Such as ddp, or ddp:static_graph=true.",
)
@click.option("--devices", metavar="N", help="A number, indices such as 0,2, or all.")
@click.option("--num-nodes", metavar="N", help="A number, or LEAST:MOST.")
@name_option(
    "precision",
    metavar="NAME",
    help="Such as 32-true or bf16-mixed.",
)
@name_option(
    "launcher",
    metavar="NAME",
    help="Who makes the processes, such as spawn.",
)
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
    asked = replace(RunRequest.parse(**given), sources=flags)
    request = asked.with_environment(os.environ, catalog)
    decided = _decide(request, catalog, manager)
    if as_json:
        write_json(_document(decided))
        return
    click.secho(f"{decided.summary()}\n", bold=True)
    explained = decided.explain().splitlines()
    write_rows(
        ((line[:_LABEL].rstrip(), line[_LABEL:]) for line in explained),
        width=_LABEL,
    )


def _decide(request: RunRequest, catalog: Catalog, manager: Manager) -> RunPlan:
    def under(environ: Mapping[str, str], request: RunRequest = request) -> RunPlan:
        return resolve(request, catalog, environ=environ, objections=manager.objections)

    nodes = request.num_nodes
    if nodes in (None, 1) or request.launcher is not None:
        return under(os.environ)
    try:
        return under(os.environ)
    except IncompatiblePlan:
        # No launcher here makes the processes of other nodes; they are started from outside.
        here = under(os.environ, replace(request, num_nodes=None)).topology.processes_per_node
    shown = nodes if isinstance(nodes, int) else f"{nodes[0]}:{nodes[1]}"
    note = (
        f"no launcher here starts processes on other nodes; this is what a rank decides where "
        f"'torchweft run --devices {here} --num-nodes {shown} …' was started on every node"
    )
    notes = [note]
    if not isinstance(nodes, int):
        notes.append(
            "nodes that come and go meet by --rdzv-backend c10d, whose store listens on every "
            "interface of its host, and so does rank 0's"
        )
    decided = under(_as_a_rank(nodes, here))
    return replace(decided, notes=(*decided.notes, *notes))


def _as_a_rank(num_nodes: int | tuple[int, int], processes: int) -> dict[str, str]:
    """The environment of a rank on the first node, as ``torchweft run`` makes it."""
    most = num_nodes if isinstance(num_nodes, int) else num_nodes[1]
    rank = RankInfo(world_size=most * processes, local_world_size=processes, run_id="plan")
    handoff = Handoff(run_id="plan", launcher="torchrun", pid=os.getpid())
    return {**os.environ, **rank.to_environ(), **handoff.to_environ()}


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
