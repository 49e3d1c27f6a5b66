"""Launcher ``ray``: an actor for each rank, on the nodes of a Ray cluster."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from torchweft.api import Launcher, RankInfo, Rendezvous, RunPlan
from torchweft.errors import InvalidRequest, RankFailed
from torchweft.launching import write_error
from torchweft_ray import program
from torchweft_ray.call import packed
from torchweft_ray.cluster import connected
from torchweft_ray.crew import ToldToEnd
from torchweft_ray.job import Job
from torchweft_ray.rank import SOCKET

__all__ = ["Ray"]


class Ray(Launcher):
    """Ranks in actors of a Ray cluster: ``num_nodes`` nodes with the ranks of ``devices`` on each.

    With a function, ``launch`` calls it in every rank. Without, every rank runs the script from its
    beginning, and the process that called ``launch`` ends with their status.

    Args:
        address: of the cluster, as ``ray.init`` takes it: ``"HOST:PORT"``, ``"auto"``, or
            ``"local"`` for one on this computer that lives as long as the run. None: what
            ``RAY_ADDRESS`` says, or the one that runs on this computer.
        cpus_per_rank: processors that are reserved for each rank, and the number of its threads.
        timeout: seconds to wait for room on the cluster, and for actors to start there.
        copy_folder: whether ranks work in a copy of the current folder. None: on those nodes that
            do not see the folder itself.
        exclude: patterns of what is not copied, in a list or between spaces.

    Raises:
        InvalidRequest: for a number that means nothing.
    """

    def __init__(
        self,
        address: str | None = None,
        cpus_per_rank: float = 1,
        timeout: float = 60.0,
        copy_folder: bool | None = None,
        exclude: str | Sequence[str] = (),
    ) -> None:
        for name, value in (("cpus_per_rank", cpus_per_rank), ("timeout", timeout)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise InvalidRequest(
                    f"launcher 'ray' was given {name}={value!r}; it takes a number above 0"
                )
        self.address = address
        self.cpus_per_rank = cpus_per_rank
        self.timeout = timeout
        self.copy_folder = copy_folder
        self.exclude = exclude.split() if isinstance(exclude, str) else list(exclude)

    def launch(
        self,
        plan: RunPlan,
        function: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        *,
        fork_hazard: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """Call the function in every rank and return rank 0's result; or return in ranks alone.

        Raises:
            NotAvailable: when no cluster is reached, or it has no room.
            Misuse: when the function cannot be pickled, or there is no script to run again.
            RankFailed: when a rank of a function failed; all others have ended.
        """
        if self.is_rank(os.environ, plan.launcher.name):
            return function(*arguments) if function is not None else None
        if function is None:
            self._script(plan)
        return self._function(plan, function, arguments)

    def rendezvous(self, rank: RankInfo, environ: Mapping[str, str]) -> Rendezvous:
        """A store of rank 0's, on a port at which it listens already."""
        first = rank.rank == 0
        return Rendezvous(
            address=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
            hosts=first,
            listen_fd=int(environ[SOCKET]) if first else None,
            prefix=f"torchweft/{rank.run_id}/{rank.restart}",
        )

    # -- in the process that launches ------------------------------------------------------------

    def _function(
        self, plan: RunPlan, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Any:
        job = Job(plan, self, program.of_function(), packed(function, arguments))
        try:
            with (
                connected(self.address) as cluster,
                job.placed(cluster) as members,
                job.started(cluster, members) as crew,
            ):
                crew.wait()
                result = crew.result()
        except ToldToEnd as told:
            number = told.number
        else:
            return pickle.loads(result) if result else None
        # Ends this process as if it had no ranks, unless the program takes the signal itself.
        signal.raise_signal(number)
        name = signal.Signals(number).name
        raise RankFailed(f"the ranks were ended by {name}", exit_status=128 + number)

    def _script(self, plan: RunPlan) -> NoReturn:
        job = Job(plan, self, program.of_this_process())
        status = 1
        with connected(self.address) as cluster, job.placed(cluster) as members:
            # Neither the rest of the script nor its ``finally`` blocks are this process's any more.
            try:
                with job.started(cluster, members) as crew:
                    crew.wait()
                status = 0
            except RankFailed as failure:
                write_error(f"torchweft: {failure}\n")
                status = failure.exit_status
            except ToldToEnd as told:
                status = 128 + told.number
            except BaseException:
                write_error(traceback.format_exc())
        sys.stdout.flush()
        os._exit(status)
