"""What the ranks of an attempt left in the run's folder, on this node: how each of them ended."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from torchweft import process
from torchweft.errors import RankFailed
from torchweft.failures import Failure, first_failure, read_failure, report

if TYPE_CHECKING:
    from torchweft.cli.run import Job

__all__ = ["NOBODY_TOLD", "Attempts"]

#: Of ranks that lost those of another node.
NOBODY_TOLD = "no other node told why; see whether one, or its command, was ended"


class Attempts:
    """The attempts of a job's ranks; torch's agent keeps a folder for each.

    Every question is about the last one.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self._folder = folder
        self._job = job
        self._marks = process.Marks(str(folder))
        self._oom_kills = process.oom_kills()

    def failures(self, told: Mapping[int, ProcessFailure]) -> list[Failure]:
        """How its ranks failed; ``told``: what the agent says of them, by global rank."""
        # Who ended by itself; the agent counts those that it ended as failures too.
        codes = self._marks.read()
        if not any(codes.values()):
            codes |= {rank: failure.exitcode for rank, failure in told.items()}
        files = self._files()
        return [
            read_failure(rank, codes.get(rank, 1), files.get(rank, self._folder / "none"))
            for rank in sorted({*codes, *(rank for rank, file in files.items() if file.exists())})
            if codes.get(rank, 1) != 0
        ]

    def report(self, failures: list[Failure]) -> RankFailed:
        """The first failure, with what is known of the other ranks."""
        codes = self._marks.read() | {failure.rank: failure.exitcode for failure in failures}
        done = {rank for rank, code in codes.items() if code == 0}
        for file in self.beside(process.done_file):
            with contextlib.suppress(OSError, ValueError):
                done.add(int(process.done_file(file).read_text()))
        stacks_of = {rank: process.read_stacks(file) for rank, file in self._files().items()}
        meanwhile = {
            rank: stacks.doing()
            for rank, stacks in stacks_of.items()
            if stacks is not None and rank not in codes and rank not in done
        }
        sizes = [failure.world_size for failure in failures]
        sizes += [stacks.world_size for stacks in stacks_of.values() if stacks is not None]
        oom_kills = process.oom_kills() - self._oom_kills
        return report(
            failures, max(sizes, default=0) or self._most(), done, meanwhile, oom_kills=oom_kills
        )

    def _most(self) -> int:
        """Ranks in all, where none came to tell it."""
        nodes = self._job.num_nodes
        return (nodes[1] if isinstance(nodes, tuple) else nodes) * self._job.processes

    def tell(self, number: int, why: str) -> None:
        """Why it ended, before attempt ``number`` begins.

        ``why``: as the agent knows; empty where the ranks do.
        """
        failures = self.failures({}) if not why else []
        if failures:
            failure = self.report(failures)
            text = str(failure)
            if self._job.num_nodes != 1 and first_failure(failures).lost_peer:
                # The node that knows the cause tells it in full. Where nodes come and go, this
                # one has waited for it in vain.
                text = text.partition("\n\n")[0]
                text += f"\n{NOBODY_TOLD}" if self._job.rdzv_endpoint else ""
            why = f"{text}\n{self.output_of(failure)}".rstrip()
        attempts = self._job.max_restarts + 1
        process.write_error(
            f"torchweft: {why or 'the ranks ended'}\n"
            f"torchweft: beginning anew, attempt {number} of {attempts} (--max-restarts)\n"
        )

    def forget(self) -> None:
        """From here on nothing is known of its ranks, which are gone."""
        self._marks.clear()
        for named in (process.minding_file, process.stacks_file):
            for file in self.beside(named):
                named(file).unlink(missing_ok=True)
        self._oom_kills = process.oom_kills()

    @property
    def begun(self) -> bool:
        """Whether one has begun."""
        return any(self._folder.glob("*/attempt_*"))

    def output_of(self, failure: RankFailed) -> str:
        """A line that says where the output of a rank is; empty where it was on the terminal."""
        if self._job.log_dir is None:
            return ""
        path = os.path.join(os.path.abspath(self._job.log_dir), f"rank-{failure.rank}.log")
        return f"its output: {path}\n"

    def beside(self, named: Callable[[Path], Path]) -> list[Path]:
        """The error files, whether there or not, beside which there is a file of that name."""
        pattern = named(Path("error.json")).name
        found = self._folder.glob(f"*/attempt_{self._last()}/*/{pattern}")
        return [file.with_name("error.json") for file in found]

    def _files(self) -> dict[int, Path]:
        """The error files, whether there or not, by rank."""
        files: dict[int, Path] = {}
        for file in self.beside(process.stacks_file):
            stacks = process.read_stacks(file)
            if stacks is not None:
                files[stacks.rank] = file
        for file in self.beside(lambda file: file):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                files[json.loads(file.read_text())["message"]["extraInfo"]["rank"]] = file
        return files

    def _last(self) -> int:
        numbers = [int(path.name.rpartition("_")[2]) for path in self._folder.glob("*/attempt_*")]
        return max(numbers, default=0)
