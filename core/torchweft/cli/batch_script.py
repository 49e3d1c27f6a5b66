"""A batch script for SLURM: its ``#SBATCH`` lines, and the ``srun`` that makes every rank."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torchweft.errors import InvalidRequest

__all__ = ["BatchScript"]

#: What sbatch reads without quotes; it takes a "#" for the beginning of a comment.
_PLAIN = re.compile(r"[\w.,:;@%/+=*()\[\]-]+")
_SIGNAL = re.compile(r"(?P<where>[BR]{1,2}:)?(?P<name>\w+)(@[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchScript:
    """What a job asks for, and the command of every rank.

    Attributes:
        options: of ``sbatch`` by their long names; True for one that takes no value.
        command: what every task runs.
        srun: options of ``srun`` that it does not take from the job.
    """

    options: Mapping[str, str | int | bool]
    command: Sequence[str]
    srun: Sequence[str] = field(default=())

    def text(self) -> str:
        """The script. Raises ``InvalidRequest`` for a value that has no place on one line."""
        head = ["#!/bin/bash", *self._lines()]
        # Where one rank fails, those that wait for it end too, whatever the cluster's default is.
        step = shlex.join(["srun", "--kill-on-bad-exit=1", *self.srun, *self.command])
        return "\n".join([*head, "", *self._run(step), ""])

    def _lines(self) -> Iterator[str]:
        for name, value in self.options.items():
            if value is False:
                continue
            yield f"#SBATCH --{name}" + ("" if value is True else f"={_quoted(name, str(value))}")

    def _run(self, step: str) -> list[str]:
        """The last lines: ``srun``, to which a signal for the script alone is handed on."""
        wanted = str(self.options.get("signal", ""))
        match = _SIGNAL.fullmatch(wanted)
        if wanted and match is None:
            raise InvalidRequest(
                f"--signal {wanted} is not understood; it takes the name of a signal and the "
                "seconds before the end at which it is sent, such as USR1@90, or B:USR1@90 for the "
                "batch script, which hands it on"
            )
        if match is None or "B" not in (match["where"] or ""):
            return [step]
        # The shell would end by the signal, and with it the job.
        return [
            f"{step} &",
            "step=$!",
            f"trap 'kill -s {match['name']} \"$step\"' {match['name']}",
            'until wait "$step"; do',
            "  status=$?",
            '  kill -0 "$step" 2> /dev/null || exit "$status"',
            "done",
        ]


def _quoted(name: str, value: str) -> str:
    if not value.isprintable():
        raise InvalidRequest(
            f"--{name} is {value!r}, which does not fit on the line of a batch script; leave out "
            "what is no printable character"
        )
    if _PLAIN.fullmatch(value):
        return value
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'"{escaped}"'
