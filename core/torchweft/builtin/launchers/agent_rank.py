"""What torch's agent runs in a forked process: the script, as if it had been started by hand."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing import reduction
from typing import Any

from torchweft import process
from torchweft.handoff import Handoff

__all__ = ["Script", "Stdin", "work"]


class Stdin:
    """The command's standard input, on its way to a process that the fork server makes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: Any = descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptor": reduction.DupFd(self._descriptor)}

    def take(self) -> None:
        """Make it this process's standard input."""
        descriptor: int = self._descriptor.detach()
        os.dup2(descriptor, 0)
        os.close(descriptor)
        process.open_stdin()

    def leave(self) -> None:
        """Close it: it is another rank's."""
        os.close(self._descriptor.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What every rank of a job runs.

    Attributes:
        path: of the script, or a module's name.
        module: whether it is a module.
        arguments: what it gets in ``sys.argv``.
        handoff: what the command tells its ranks.
        folder: of the run, on this node.
        stdin: for local rank 0; None where the command has none.
        environ: further variables; the fork server was started before they were known.
    """

    path: str
    module: bool
    arguments: tuple[str, ...]
    handoff: Handoff
    folder: str
    stdin: Stdin | None
    environ: Mapping[str, str]


def work(script: Script) -> None:
    """Run the script in a rank that this process guards. Returns when the rank ended well."""
    process.die_with_parent(os.getppid())
    # The parent is the fork server, which lives for as long as any of its processes.
    command: Any = multiprocessing.parent_process()
    marks = process.Marks(script.folder)
    code = process.fork_guarded(supervisor=command.sentinel, marks=marks)
    if code is None:
        process.forget_crash_handler()
        run = process.run_module if script.module else process.run_script
        try:
            _enter(script)
            process.let_in(signal.SIGINT)
            code = run(script.path, list(script.arguments))
        except KeyboardInterrupt:  # before the script was
            code = 128 + signal.SIGINT
        except BaseException as error:
            process.record_failure(error)
            code = 1
        os._exit(code)
    if code != 0:
        process.end_like(code)
    # torch's agent waits for this function to return, in every rank.


def _enter(script: Script) -> None:
    first = os.environ["LOCAL_RANK"] == "0"
    if script.stdin is not None:
        script.stdin.take() if first else script.stdin.leave()
    if not first:
        process.close_stdin()
    if script.handoff.log_dir:
        process.redirect_output(script.handoff.log_dir, script.folder)
    process.as_main_process()
    os.environ.update(script.environ)
    os.environ.update(replace(script.handoff, pid=os.getpid(), parent=None).to_environ())
    process.share_threads(int(os.environ["LOCAL_WORLD_SIZE"]))
