"""``torchweft slurm``: print the batch script of a job for SLURM, or submit it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from torchweft.catalog import Catalog
from torchweft.cli.batch_script import BatchScript
from torchweft.cli.completion import name_option
from torchweft.cli.program import check_program, module_option
from torchweft.errors import InvalidRequest, NotAvailable, UnknownName, did_you_mean
from torchweft.manager import Manager
from torchweft.missing import unknown_name
from torchweft.request import RunRequest

__all__ = ["slurm"]

#: By our flag, what sbatch calls it; in the order of the script.
_OPTIONS = {
    "job_name": "job-name",
    "nodes": "nodes",
    "devices": "ntasks-per-node",
    "cpus_per_task": "cpus-per-task",
    "gpus_per_node": "gpus-per-node",
    "time": "time",
    "partition": "partition",
    "account": "account",
    "output": "output",
    "signal": "signal",
    "requeue": "requeue",
}
#: What ``torchweft run`` hands to the script's Fabric in every task.
_HANDED_ON = ("accelerator", "strategy", "precision")


@click.command(
    context_settings={"ignore_unknown_options": True},
    short_help="Print or submit a batch script for SLURM.",
)
@click.argument("script", type=click.Path())
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--nodes", type=click.IntRange(min=1), default=1, help="Number of nodes. Default: 1.")
@click.option(
    "--devices", type=click.IntRange(min=1), default=1, help="Ranks on each node. Default: 1."
)
@click.option("--gpus-per-node", metavar="N", help="GPUs of each node: 4, or a100:4.")
@click.option("--cpus-per-task", type=click.IntRange(min=1), help="Processors of each rank.")
@click.option("--time", metavar="LIMIT", help="Such as 30 (minutes), 4:00:00 or 2-0.")
@click.option("--partition", metavar="NAME", help="Where to run.")
@click.option("--account", metavar="NAME", help="Who pays.")
@click.option("--job-name", metavar="NAME", help="Default: the name of SCRIPT.")
@click.option("--output", metavar="PATH", help="Where the output goes. Default: SLURM's.")
@click.option(
    "--signal",
    metavar="NAME@SECONDS",
    help="Warn every rank before the time is over: USR1@90.",
)
@click.option("--requeue", is_flag=True, help="Let SLURM put the job back into the queue.")
@click.option(
    "--sbatch-option",
    "more",
    metavar="KEY=VALUE",
    multiple=True,
    help="Any other option of sbatch: constraint=a100, or exclusive. May be repeated.",
)
@name_option("accelerator", metavar="NAME", help="Handed on to Fabric(...).")
@name_option("strategy", metavar="NAME", help="Handed on to Fabric(...).")
@name_option("precision", metavar="NAME", help="Handed on to Fabric(...).")
@module_option
@click.option("--submit", is_flag=True, help="Submit it with sbatch and print the job's number.")
def slurm(
    script: str,
    arguments: tuple[str, ...],
    more: tuple[str, ...],
    module: bool,
    submit: bool,
    **given: Any,
) -> None:
    """Print a batch script that runs SCRIPT with ARGUMENTS under SLURM, a rank for every task.

    SCRIPT is run with this Python, from the folder where the job is submitted. Flags may stand
    before or behind SCRIPT; what is not a flag listed here goes to the script, and so does
    everything behind "--".

    \b
    torchweft slurm --nodes 2 --devices 4 --gpus-per-node 4 train.py > job.sh
    sbatch job.sh
    """
    if arguments[:1] == ("--",):
        arguments = arguments[1:]
    program = check_program(script, module, slurm)
    _check_names(given)
    given["job_name"] = given["job_name"] or (script if module else Path(script).stem)
    options: dict[str, Any] = {
        name: given[flag] for flag, name in _OPTIONS.items() if given[flag] is not None
    }
    batch = BatchScript(
        options={**options, **_others(more)},
        command=_command(program, arguments, given),
        # Since SLURM 22.05 a step does not take it from the job.
        srun=[f"--cpus-per-task={given['cpus_per_task']}"] if given["cpus_per_task"] else [],
    )
    text = batch.text()
    click.echo(_submit(text) if submit else text, nl=submit)


def _check_names(given: dict[str, Any]) -> None:
    """A slip is told here, and not by every task after an hour in the queue.

    Any other name that nobody has here may be the script's own, or of the cluster's nodes.
    """
    request = RunRequest.parse(**{name: given[name] for name in _HANDED_ON})
    catalog = Catalog(Manager.from_entry_points(os.environ).declared)
    for kind in _HANDED_ON:
        name = getattr(request, kind)
        known = {*catalog.names(kind), "auto"}
        if name is not None and name not in known and did_you_mean(name, known):
            error = unknown_name(kind, name, catalog, source=f"--{kind}")
            if isinstance(error, UnknownName):
                raise error


def _command(program: list[str], arguments: tuple[str, ...], given: dict[str, Any]) -> list[str]:
    handed = [f"--{name}={given[name]}" for name in _HANDED_ON if given[name] is not None]
    if not handed:
        return [sys.executable, *program, *arguments]
    # Without --devices it becomes that Python itself.
    return [sys.executable, "-m", "torchweft", "run", *handed, *program, "--", *arguments]


def _others(more: tuple[str, ...]) -> dict[str, str | bool]:
    """What else sbatch is to be told."""
    flags = {name: flag for flag, name in _OPTIONS.items()}
    options: dict[str, str | bool] = {}
    for text in more:
        name, equals, value = text.removeprefix("--").partition("=")
        if not name.replace("-", "").isalnum() or (equals and not value):
            raise InvalidRequest(
                f"--sbatch-option {text} is not understood; it takes the long name of an option of "
                "sbatch with its value, such as constraint=a100, or the name alone, such as "
                "exclusive"
            )
        if name in flags:
            flag = f"--{flags[name].replace('_', '-')}"
            raise InvalidRequest(
                f"--sbatch-option {text} says what {flag} says; write {flag} {value}".rstrip()
            )
        if name in options:
            raise InvalidRequest(
                f"--sbatch-option gives '{name}' twice, {options[name]!r} and {value!r}; leave one "
                "of them out"
            )
        options[name] = value if equals else True
    return options


def _submit(text: str) -> str:
    """Hand the script to sbatch; the number of the job."""
    program = shutil.which("sbatch")
    if program is None:
        raise NotAvailable(
            "--submit needs sbatch, which is not installed here (it is not in PATH); run this on a "
            "login node of the cluster, or leave --submit out, and the script is printed"
        )
    done = subprocess.run(
        [program, "--parsable"], input=text, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        words = " ".join(done.stderr.split()) or "nothing"
        raise NotAvailable(
            f"sbatch ({program}) refused the job with status {done.returncode} and said: {words}; "
            "leave --submit out to see the script"
        )
    # Of several clusters it names the one behind the number.
    return done.stdout.strip().partition(";")[0]
