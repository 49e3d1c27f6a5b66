"""Whether SLURM's ``srun`` made this process. Free of torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torchweft.builtin.launchers.slurm_step import Step
from torchweft.errors import InvalidRequest
from torchweft.handoff import Handoff
from torchweft.specs import Detection

__all__ = ["slurm"]


def slurm(environ: Mapping[str, str]) -> Detection | None:
    """A task of a step.

    Not the batch script, nor a program that somebody started by hand in the shell of ``salloc`` or
    ``srun --pty``, in a notebook or in a terminal multiplexer, nor one that a rank started.
    """
    if not Step.is_described(environ):
        return None
    handoff = Handoff.read(environ)
    if handoff is not None and handoff.launcher not in ("", "slurm"):
        return None
    if not _is_the_task(environ) and (Handoff.stale(environ) or _by_hand(environ)):
        return None
    try:
        step = Step.read(environ)
    except InvalidRequest as error:
        # Only if nobody nearer to this process made it.
        return Detection(reason="srun started this process", objection=str(error))
    return _detection(step)


def _detection(step: Step) -> Detection:
    even = len(set(step.per_node)) == 1
    return Detection(
        reason=f"srun started {step.tasks} task(s)",
        world_size=step.tasks,
        processes_per_node=step.per_node[0] if even else None,
        objection="" if even else _uneven(step),
        processes_hint="write '#SBATCH --ntasks-per-node={wanted}' in place of "
        f"{step.per_node[0]} (or that option of srun)",
        nodes_hint="write '#SBATCH --nodes={wanted}' in place of "
        f"{len(step.per_node)} (or that option of srun)",
        devices_hint="write '#SBATCH --gpus-per-node={wanted}' without --gpus-per-task and "
        "--gpu-bind, which hide the other devices of a node from a task",
    )


def _uneven(step: Step) -> str:
    nodes = len(step.per_node)
    counts = ", ".join(map(str, step.per_node[:8])) + (", …" if nodes > 8 else "")
    each = -(-step.tasks // nodes)
    return (
        f"not the same number on every node: {counts} on {step.node_list}; write "
        f"'#SBATCH --ntasks-per-node={each}' in place of --ntasks={step.tasks} (or that option of "
        "srun)"
    )


def _is_the_task(environ: Mapping[str, str]) -> bool:
    """Whether SLURM started this very process, so that no variable can be left from elsewhere."""
    return environ.get("SLURM_TASK_PID") == str(os.getpid())


def _by_hand(environ: Mapping[str, str]) -> bool:
    """Whether this process is in a session that somebody opened below a task.

    A task has no terminal unless it was asked for with ``--pty``, to type there. The kernel of a
    notebook and a terminal multiplexer are in a session of their own.
    """
    return _has_terminal() or not _in_session_of(environ.get("SLURM_TASK_PID", ""))


def _has_terminal() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    os.close(terminal)
    return True


def _in_session_of(task: str) -> bool:
    try:
        return os.getsid(int(task)) == os.getsid(0)
    # In a container, whose processes have numbers of their own, nothing can be told.
    except (OSError, ValueError):
        return True
