"""``torchweft run``: start a script on several processes, through torch's elastic agent."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

from torchweft import process
from torchweft.catalog import Catalog
from torchweft.cli.completion import name_option
from torchweft.cli.fork_server import end_fork_server, start_fork_server
from torchweft.cli.program import check_program, module_option
from torchweft.cli.rendezvous import check_nodes, pairs
from torchweft.detection import detect
from torchweft.errors import (
    IncompatiblePlan,
    InvalidRequest,
    NotAvailable,
    TorchweftError,
)
from torchweft.handoff import Handoff
from torchweft.manager import Manager
from torchweft.missing import unknown_name
from torchweft.plan import RunPlan
from torchweft.request import RunRequest
from torchweft.resolve import resolve
from torchweft.specs import Detection

__all__ = ["AGENT", "check_outside", "run"]

#: The launcher whose processes this command has torch's agent make.
AGENT = "torchrun"

#: Flags that say how to make processes; they mean nothing where the script makes them itself.
_NEED_DEVICES = (
    "num_nodes",
    "node_rank",
    "main_address",
    "main_port",
    "max_restarts",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_conf",
    "join_timeout",
    "no_preload",
    "log_dir",
    "tee",
    "timeout",
)

#: Seconds that nodes wait for each other, as torch's agent does.
_JOIN_TIMEOUT = 600.0
#: The longest time that a flag takes, in seconds; beyond some centuries torch's clocks overflow.
_LONGEST = 366 * 86400.0


class _Seconds(click.FloatRange):
    """A time that ends: neither ``inf`` nor ``nan``."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds: float = super().convert(value, param, ctx)
        if not seconds <= _LONGEST:
            self.fail(f"{value} is no number of seconds up to {_LONGEST:.0f}, a year.", param, ctx)
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What was asked of the command.

    Attributes:
        script: path of the script, or a module's name.
        module: whether it is a module.
        arguments: what it gets in ``sys.argv``.
        flags: those that the user gave and that Fabric's arguments must agree with.
        processes: on this node.
        dry_run: whether one batch of every loader is enough.
        preload: modules that the fork server imports once.
        log_dir: where each rank has a file for its output; None: it goes to the terminal.
        tee: ranks whose output is shown too, each line behind its rank; None: nobody's.
        timeout: seconds that a collective may take; None: as long as the strategy allows.
    """

    script: str
    module: bool
    arguments: tuple[str, ...]
    flags: dict[str, Any]
    dry_run: bool
    processes: int
    preload: tuple[str, ...]
    num_nodes: int | tuple[int, int]
    node_rank: int
    main_address: str | None
    main_port: int | None
    max_restarts: int
    rdzv_backend: str | None
    rdzv_endpoint: str | None
    rdzv_conf: tuple[tuple[str, str], ...]
    join_timeout: float
    fresh: bool
    run_id: str
    log_dir: str | None = None
    tee: tuple[int, ...] | Literal["all"] | None = None
    timeout: float | None = None


@click.command(
    context_settings={"ignore_unknown_options": True},
    short_help="Run a script on several processes.",
)
@click.argument("script", type=click.Path())
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@name_option(
    "accelerator",
    help="Name of the accelerator, or auto.",
)
@name_option(
    "strategy",
    help="Name of the strategy, with options: ddp:static_graph=true.",
)
@click.option("--devices", help="Processes per node (2), devices by index (0,2), all, or auto.")
@click.option("--num-nodes", help="Number of nodes, or least:most for an elastic run.")
@click.option("--node-rank", type=click.IntRange(min=0), help="Rank of this node. Default: 0.")
@click.option("--main-address", help="Address of node 0. Default: 127.0.0.1.")
@click.option("--main-port", type=click.IntRange(1, 65535), help="Port of node 0.")
@name_option(
    "precision",
    help="Name of the precision: 32-true, bf16-mixed, …",
)
@name_option(
    "launcher",
    help="Who makes the processes, where it is not torch's agent: ray, …",
)
@module_option
@click.option("--max-restarts", type=click.IntRange(min=0), help="After failures. Default: 0.")
@click.option("--rdzv-backend", help="How several nodes meet: static (default), c10d, …")
@click.option("--rdzv-endpoint", help="Where they meet: HOST:PORT.")
@click.option("--rdzv-conf", help="More for the backend: last_call_timeout=5,read_timeout=60.")
@click.option(
    "--join-timeout",
    type=_Seconds(min=1),
    help="Seconds that nodes wait for each other. Default: 600.",
)
@click.option("--log-dir", help="Folder: each rank writes its output to rank-N.log there.")
@click.option("--tee", help="Ranks (0,2 or all) whose output is shown behind [rank N].")
@click.option(
    "--timeout",
    type=_Seconds(min=0, min_open=True),
    help="Seconds for a collective; past it, every rank's stacks are written and the run ends.",
)
@click.option("--dry-run", is_flag=True, help="Stop after one batch of every loader.")
@click.option("--no-preload", is_flag=True, default=None, help="Start fresh interpreters.")
def run(
    script: str, arguments: tuple[str, ...], dry_run: bool, module: bool, **options: Any
) -> None:
    """Run SCRIPT with ARGUMENTS, as python does, on several processes.

    With --devices, torch's elastic agent makes the processes; without, or with another --launcher,
    the script's own fabric.launch() does. Flags may stand before or behind SCRIPT; what is not a
    flag listed here goes to the script, and so does everything behind "--".

    Flags and the arguments of Fabric(...) must agree; a flag fills in what the script leaves open.
    """
    if script == "model" and arguments and not Path(script).exists():
        script, *rest = arguments  # "torchweft run model train.py", the older form
        arguments = tuple(rest)
    if arguments[:1] == ("--",):
        arguments = arguments[1:]
    program = check_program(script, module, run)
    given = {name: value for name, value in options.items() if value is not None}
    flags: dict[str, Any] = {
        name: given[name]
        for name in ("accelerator", "strategy", "devices", "num_nodes", "precision", "launcher")
        if name in given
    }
    request = RunRequest.parse(**flags)
    request = replace(request, sources={name: f"--{name.replace('_', '-')}" for name in flags})
    if request.launcher not in (None, AGENT):
        _refuse_beside_launcher(given, request.launcher)
        catalog = _catalog()
        _check_launcher(request.launcher, catalog)
        _become_python(program, arguments, flags, dry_run)
    if request.devices is None:
        _refuse_without_devices(given)
        _become_python(program, arguments, flags, dry_run)
    process.exit_on_signals()
    catalog = _catalog()
    check_outside(request, catalog)
    processes, preload = _processes(request, catalog)
    job = Job(
        script=script,
        module=module,
        arguments=tuple(arguments),
        flags=flags,
        dry_run=dry_run,
        processes=processes,
        preload=preload,
        num_nodes=request.num_nodes or 1,
        node_rank=given.get("node_rank", 0),
        main_address=given.get("main_address"),
        main_port=given.get("main_port"),
        max_restarts=given.get("max_restarts", 0),
        rdzv_backend=given.get("rdzv_backend"),
        rdzv_endpoint=given.get("rdzv_endpoint"),
        rdzv_conf=pairs(given.get("rdzv_conf")),
        join_timeout=given.get("join_timeout", _JOIN_TIMEOUT),
        # Elsewhere than on Linux a process that has used the system's libraries cannot be forked.
        fresh=bool(given.get("no_preload")) or sys.platform != "linux",
        run_id=_run_id(request, given),
        log_dir=given.get("log_dir"),
        tee=_ranks_shown(given.get("tee")),
        timeout=given.get("timeout"),
    )
    check_nodes(job)
    _check_output(job)
    process.exit_on_signals(end_fork_server)
    if not job.fresh:
        start_fork_server(job.preload)
    # Only now: torch takes a second, in which the fork server imports it too.
    with process.collector_off(), _quiet_library():
        from torchweft.cli.agent import drive

    process.exit_on_signals()
    drive(job)


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Where torch is imported: its C++ code prints a page for each connection that is closed.

    In this process alone, which says itself what has gone, and unless the user wants to see it.
    """
    name = "TORCH_CPP_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "ERROR"
    try:
        yield
    finally:
        del os.environ[name]


def _run_id(request: RunRequest, given: dict[str, Any]) -> str:
    """Unique on one node; on several, what all of them can know without having met."""
    if request.num_nodes in (None, 1) and "rdzv_endpoint" not in given:
        return uuid.uuid4().hex[:16]
    where = (given.get("rdzv_endpoint"), given.get("main_address"), given.get("main_port"))
    return "-".join(["torchweft", *(str(part) for part in where if part is not None)])


def _ranks_shown(text: str | None) -> tuple[int, ...] | Literal["all"] | None:
    if text is None or text == "all":
        return "all" if text else None
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise InvalidRequest(
            f"--tee takes ranks as in '0,2', or 'all'; it was given '{text}'. The folder for the "
            "files is --log-dir"
        )
    return tuple(int(part) for part in text.split(","))


def _check_output(job: Job) -> None:
    """Raise where there would be nothing to show, or no place to write."""
    most = job.num_nodes[1] if isinstance(job.num_nodes, tuple) else job.num_nodes
    ranks = most * job.processes
    none = [rank for rank in job.tee if rank >= ranks] if isinstance(job.tee, tuple) else []
    if none:
        raise InvalidRequest(
            f"--tee {','.join(map(str, none))}: there are ranks 0 to {ranks - 1} (--devices, "
            "--num-nodes); name one of them, or 'all'"
        )
    if job.log_dir is None:
        return
    import tempfile  # for few, and not before the fork server is there

    try:
        os.makedirs(job.log_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=job.log_dir):
            pass
    except OSError as error:
        raise InvalidRequest(
            f"--log-dir {job.log_dir}: no file can be written there ({error.strerror or error}); "
            "name a folder that is yours, or one that is not there yet"
        ) from error


def _catalog() -> Catalog:
    return Catalog(Manager.from_entry_points(os.environ).declared)


def _outside(catalog: Catalog) -> Detection | None:
    """What a launcher says that made this process, on nodes whose number can be chosen."""
    detection = detect(catalog, os.environ, None).detection
    return detection if detection is not None and detection.nodes_hint else None


def check_outside(request: RunRequest, catalog: Catalog) -> None:
    """With --devices this process is a node: refuse where others were started that are none.

    A process that was started alone on its node may be one of several nodes.
    """
    outside = _outside(catalog)
    started = outside.world_size if outside is not None else None
    asked = request.num_nodes or 1
    least, most = asked if isinstance(asked, tuple) else (asked, asked)
    if outside is None or started in (None, 1) or least <= started <= most:
        return
    nodes = f"{least}" if least == most else f"{least}:{most}"
    raise InvalidRequest(
        f"--devices makes a node of this process, of {nodes} in all (--num-nodes), but "
        f"{outside.reason}, which would make {started} nodes; leave --devices out, and each of "
        f"them is a rank, or start one on each node and give --num-nodes"
    )


def _refuse_without_devices(given: dict[str, Any]) -> None:
    lone = [f"--{name.replace('_', '-')}" for name in _NEED_DEVICES if name in given]
    # The script's Fabric compares it with what a launcher outside made.
    if lone == ["--num-nodes"] and _outside(_catalog()) is not None:
        return
    if lone:
        raise InvalidRequest(
            f"{' and '.join(lone)} without --devices: the script's own fabric.launch() would make "
            "the processes and know nothing of it; add --devices N, the processes on each node"
        )


def _refuse_beside_launcher(given: dict[str, Any], launcher: str | None) -> None:
    names = [name for name in _NEED_DEVICES if name in given and name != "num_nodes"]
    if names:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in names)
        raise InvalidRequest(
            f"{flags} with --launcher {launcher}: that is for torch's agent, which makes the "
            f"processes where --devices N is given and no other launcher; leave one of the two out"
        )


def _check_launcher(name: str, catalog: Catalog) -> None:
    """Refuse one that nobody declares, or that has to start this command and did not."""
    entries = catalog.named("launcher", name)
    if not entries:
        raise unknown_name("launcher", name, catalog, source="--launcher")
    found = detect(catalog, os.environ, name).entry
    specs: list[Any] = [entry.spec for entry in entries]
    if found is None and all(spec.outside for spec in specs):
        how = next((f"; start the script with '{spec.start}'" for spec in specs if spec.start), "")
        raise IncompatiblePlan(
            f"--launcher {name}: launcher {entries[0].describe()} makes the processes from "
            f"outside, and did not start this command{how}"
        )


def _become_python(
    program: list[str], arguments: tuple[str, ...], flags: dict[str, Any], dry_run: bool
) -> NoReturn:
    """Where the script makes the processes this is ``python script``, in this very process."""
    environ = dict(os.environ)
    if flags or dry_run:
        handoff = Handoff(
            run_id=uuid.uuid4().hex[:16], flags=flags, dry_run=dry_run, pid=os.getpid()
        )
        environ.update(handoff.to_environ())
    sys.stdout.flush()
    sys.stderr.flush()
    python = [sys.executable, *process.interpreter_flags()]
    os.execve(sys.executable, [*python, *program, *arguments], environ)


def _processes(request: RunRequest, catalog: Catalog) -> tuple[int, tuple[str, ...]]:
    """Processes on this node, and what to import before they are forked."""
    # Resolved as one node without a launcher: who makes the processes is settled, it is us. The
    # variables that another launcher left in this environment are not this run's.
    alone = replace(request, num_nodes=None, launcher=None)
    try:
        plan: RunPlan = resolve(alone, catalog, environ={})
    except (NotAvailable, IncompatiblePlan):
        # With no accelerator named, the script may name one that the default choice is not.
        others = [entry.spec.name for entry in catalog.entries("accelerator")]
        if request.accelerator is not None or not isinstance(request.devices, int):
            raise
        if not any(_resolves(replace(alone, accelerator=name), catalog) for name in others):
            raise
        return request.devices, ()
    modules = [
        spec.target.partition(":")[0] for spec in (plan.accelerator, plan.strategy, plan.precision)
    ]
    return plan.topology.processes_per_node, (*modules, *plan.strategy.preload)


def _resolves(request: RunRequest, catalog: Catalog) -> bool:
    try:
        resolve(request, catalog, environ={})
    except TorchweftError:
        return False
    return True
