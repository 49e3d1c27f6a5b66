"""What SLURM tells a task of a step about itself and the others. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torchweft.errors import InvalidRequest

__all__ = ["Step"]

#: SLURM numbers what is no step of tasks from the top: batch scripts, shells of salloc, ….
_RESERVED = 0xFFFFFFF0
_COUNT = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One run of ``srun``, as one of its tasks sees it.

    Attributes:
        job: number of the job.
        number: of the step in its job.
        tasks: in the whole step.
        per_node: tasks on each of its nodes.
        node: number of this node among those of the step.
        local_task: number of this task on its node.
        node_list: names of the nodes, as SLURM writes them.
        restart: how often the job was put back into the queue.
    """

    job: int
    number: int
    tasks: int
    per_node: tuple[int, ...]
    node: int
    local_task: int
    node_list: str
    restart: int

    @staticmethod
    def is_described(environ: Mapping[str, str]) -> bool:
        """Whether the environment is that of a task of a step, or came from there.

        A batch script has the number of a task, and no step; the shell of ``salloc`` has a
        reserved one, where it runs on a node of the job.
        """
        number = environ.get("SLURM_STEP_ID", "")
        return "SLURM_PROCID" in environ and number.isdecimal() and int(number) < _RESERVED

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Step:
        """What the environment says. Raises ``InvalidRequest`` where it contradicts itself."""
        step = cls(
            job=_number(environ, "SLURM_JOB_ID"),
            number=_number(environ, "SLURM_STEP_ID"),
            tasks=_number(environ, "SLURM_STEP_NUM_TASKS"),
            per_node=_counts(environ, "SLURM_STEP_TASKS_PER_NODE"),
            node=_number(environ, "SLURM_NODEID"),
            local_task=_number(environ, "SLURM_LOCALID"),
            node_list=_text(environ, "SLURM_STEP_NODELIST"),
            restart=_number(environ, "SLURM_RESTART_COUNT", "0"),
        )
        if sum(step.per_node) != step.tasks:
            raise _wrong(environ, "SLURM_STEP_TASKS_PER_NODE", f"{step.tasks} tasks in all")
        if step.node >= len(step.per_node):
            raise _wrong(environ, "SLURM_NODEID", f"less than {len(step.per_node)}, the nodes")
        if step.local_task >= step.per_node[step.node]:
            tasks = step.per_node[step.node]
            raise _wrong(environ, "SLURM_LOCALID", f"less than {tasks}, the tasks of this node")
        return step


def _text(environ: Mapping[str, str], name: str, default: str = "") -> str:
    text = environ.get(name) or default
    if not text:
        raise _wrong(environ, name, "what srun sets")
    return text


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = _text(environ, name, default)
    if not re.fullmatch("[0-9]+", text):
        raise _wrong(environ, name, "a number from 0")
    return int(text)


def _counts(environ: Mapping[str, str], name: str) -> tuple[int, ...]:
    """``2(x3),1`` is 2, 2, 2 and 1."""
    counts: list[int] = []
    for part in _text(environ, name).split(","):
        match = _COUNT.fullmatch(part)
        if match is None:
            raise _wrong(environ, name, "numbers such as 2(x3),1")
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return tuple(counts)


def _wrong(environ: Mapping[str, str], name: str, due: str) -> InvalidRequest:
    found = f"is '{environ[name]}'" if name in environ else "is not set"
    return InvalidRequest(
        f"the environment variable {name} {found}, and {due} is due; unset SLURM_STEP_ID if this "
        "process is no task of srun"
    )
