"""``torchweft run``: start a script on several processes, through torch's elastic agent."""

from __future__ import annotations

import os
import re
import sys
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

from torchweft import process
from torchweft.catalog import Catalog
from torchweft.cli.completion import name_option
from torchweft.detection import detect
from torchweft.errors import (
    IncompatiblePlan,
    InvalidRequest,
    NotAvailable,
    TorchweftError,
    did_you_mean,
)
from torchweft.handoff import Handoff
from torchweft.manager import Manager
from torchweft.missing import unknown_name
from torchweft.plan import RunPlan
from torchweft.request import RunRequest
from torchweft.resolve import resolve
from torchweft.specs import Detection

__all__ = ["AGENT", "check_outside", "check_script", "run"]

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
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module's name, as for python -m.")
@click.option("--max-restarts", type=click.IntRange(min=0), help="After failures. Default: 0.")
@click.option("--rdzv-backend", help="How several nodes meet: static (default), c10d, …")
@click.option("--rdzv-endpoint", help="Where they meet: HOST:PORT.")
@click.option("--rdzv-conf", help="More for the backend: last_call_timeout=5,read_timeout=60.")
@click.option(
    "--join-timeout",
    type=click.FloatRange(min=1),
    help="Seconds that nodes wait for each other. Default: 600.",
)
@click.option("--log-dir", help="Folder: each rank writes its output to rank-N.log there.")
@click.option("--tee", help="Ranks (0,2 or all) whose output is shown behind [rank N].")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
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
    if module:
        _check_module(script)
    else:
        check_script(script, run)
    given = {name: value for name, value in options.items() if value is not None}
    flags: dict[str, Any] = {
        name: given[name]
        for name in ("accelerator", "strategy", "devices", "num_nodes", "precision", "launcher")
        if name in given
    }
    request = RunRequest.parse(**flags)
    request = replace(request, sources={name: f"--{name.replace('_', '-')}" for name in flags})
    program = ["-m", script] if module else [script]
    if request.launcher not in (None, AGENT):
        _refuse_beside_launcher(given, request.launcher)
        catalog = _catalog()
        if not catalog.named("launcher", request.launcher):
            raise unknown_name("launcher", request.launcher, catalog, source="--launcher")
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
        rdzv_conf=_pairs(given.get("rdzv_conf")),
        join_timeout=given.get("join_timeout", _JOIN_TIMEOUT),
        # Elsewhere than on Linux a process that has used the system's libraries cannot be forked.
        fresh=bool(given.get("no_preload")) or sys.platform != "linux",
        run_id=_run_id(request, given),
        log_dir=given.get("log_dir"),
        tee=_ranks_shown(given.get("tee")),
        timeout=given.get("timeout"),
    )
    _check_nodes(job)
    if not job.fresh:
        start_fork_server(job)
    # Only now: torch takes a second, in which the fork server imports it too.
    with process.collector_off():
        from torchweft.cli.agent import drive

    drive(job)


def _run_id(request: RunRequest, given: dict[str, Any]) -> str:
    """Unique on one node; on several, what all of them can know without having met."""
    if request.num_nodes in (None, 1) and "rdzv_endpoint" not in given:
        return uuid.uuid4().hex[:16]
    where = (given.get("rdzv_endpoint"), given.get("main_address"), given.get("main_port"))
    return "-".join(["torchweft", *(str(part) for part in where if part is not None)])


def _pairs(text: str | None) -> tuple[tuple[str, str], ...]:
    parts = [part.partition("=") for part in text.split(",")] if text else []
    wrong = [name for name, equals, _ in parts if not (name and equals)]
    if wrong:
        raise InvalidRequest(
            f"--rdzv-conf takes 'key=value,key=value'; it was given '{text}', where '{wrong[0]}' "
            "has no value"
        )
    return tuple((name.strip(), value.strip()) for name, _, value in parts)


def _ranks_shown(text: str | None) -> tuple[int, ...] | Literal["all"] | None:
    if text is None or text == "all":
        return "all" if text else None
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise InvalidRequest(
            f"--tee takes ranks as in '0,2', or 'all'; it was given '{text}'. The folder for the "
            "files is --log-dir"
        )
    return tuple(int(part) for part in text.split(","))


def _check_module(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise InvalidRequest(
            f"-m takes a module's name, such as package.train; '{name}' is none. For a file leave "
            "-m out"
        )


def _check_python(path: Path) -> None:
    """Raise ``InvalidRequest`` for a file that python would only stumble over."""
    with path.open("rb") as file:
        head = file.read(4096)
    first = head.split(b"\n", 1)[0]
    if path.suffix == ".ipynb":
        what = "a notebook; save it as a script (jupyter nbconvert --to script), or launch in it"
    elif first.startswith(b"#!") and b"python" not in first:
        what = f"a program for {first[2:].decode(errors='replace').strip()}; let it call this"
        what += " command with the Python file in it"
    elif b"\0" in head:
        what = "no text; name the Python source"
    else:
        return
    raise InvalidRequest(
        f"script '{path}' is not Python: it is {what}. A module is run with -m package.module"
    )


def check_script(script: str, command: click.Command) -> None:
    """Raise ``InvalidRequest`` unless there is a script, for a command that takes one."""
    path = Path(script)
    if path.is_file():
        _check_python(path)
        return
    if script.startswith("-"):
        flags = [flag for parameter in command.params for flag in parameter.opts]
        name = script.partition("=")[0]
        raise InvalidRequest(
            f"'torchweft {command.name}' has no option {name}{did_you_mean(name, flags)}; what is "
            "meant for the script stands behind its path"
        )
    if path.is_dir():
        raise InvalidRequest(f"script '{script}' is a folder; name the Python file in it")
    near = ""
    if path.parent.is_dir():
        names = sorted(other.name for other in path.parent.glob("*.py"))[:5]
        near = f"; Python files there: {', '.join(names)}" if names else ""
    module = script.removesuffix(".py")
    if not near and "." in module and all(part.isidentifier() for part in module.split(".")):
        near = f"; a module is run with -m {module}"
    raise InvalidRequest(
        f"script '{script}' does not exist (looked in {path.absolute().parent}){near}"
    )


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


def _check_nodes(job: Job) -> None:
    several = job.num_nodes != 1
    elastic = isinstance(job.num_nodes, tuple)
    backend = job.rdzv_backend or "static"
    if elastic and backend == "static":
        raise InvalidRequest(
            f"--num-nodes {job.flags['num_nodes']} lets nodes come and go, which the static "
            "rendezvous cannot; add --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
        )
    if backend != "static" and not job.rdzv_endpoint:
        raise InvalidRequest(
            f"--rdzv-backend {backend} needs --rdzv-endpoint HOST:PORT, where the nodes meet"
        )
    if backend == "static" and job.rdzv_endpoint:
        raise InvalidRequest(
            f"--rdzv-endpoint {job.rdzv_endpoint} is for --rdzv-backend c10d; the static "
            "rendezvous takes --main-address and --main-port"
        )
    if several and backend == "static" and not job.main_address:
        raise InvalidRequest(
            f"--num-nodes {job.num_nodes} needs to know where the nodes meet; add --main-address "
            "HOST (the address of node 0) and --node-rank on every node"
        )
    most = job.num_nodes[1] if isinstance(job.num_nodes, tuple) else job.num_nodes
    if job.node_rank >= most:
        raise InvalidRequest(
            f"--node-rank {job.node_rank} is not one of 0 to {most - 1} (--num-nodes {most})"
        )


def start_fork_server(job: Job) -> None:
    """Start the process that imports torch once and forks every rank, restarts included."""
    import multiprocessing
    import multiprocessing.util
    from importlib.machinery import ModuleSpec
    from multiprocessing import forkserver

    # What a rank re-imports as __main__ is the script, never this command.
    sys.modules["__main__"].__spec__ = ModuleSpec("torchweft.__main__", None)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        process.served(["torchweft.builtin.launchers.agent_rank", *job.preload])
    )
    # Python looks into a server's current folder first, where the user's files may hide a library.
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(multiprocessing.util.get_temp_dir())
        forkserver.ensure_running()
    finally:
        os.fchdir(here)
        os.close(here)
