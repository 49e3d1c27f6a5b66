"""Drives torch's elastic agent for ``torchweft run``, and tells the first failure once."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from torchweft import process
from torchweft.builtin.launchers.agent_rank import Script, Stdin, work
from torchweft.cli.following import Follower
from torchweft.errors import RankFailed, TorchweftError
from torchweft.failures import read_failure, report
from torchweft.handoff import Handoff
from torchweft.process import Marks

if TYPE_CHECKING:
    from torchweft.cli.run import Job

__all__ = ["drive"]

#: A fresh rank looks for nothing in the current folder, where files may hide a library.
_FRESH = (
    "import sys; sys.path[:1] = sys.path[:1] if sys.path[0] else []; "
    "from torchweft.fresh import main; main()"
)

#: The port on which nodes meet when none is named, as torchrun's c10d.
_PORT = 29400


def drive(job: Job) -> NoReturn:
    """Run the job to its end and end this process with its status."""
    _quieten()
    folder = Path(tempfile.mkdtemp(prefix="torchweft-"))
    status = 1
    try:
        status = _drive(job, folder)
    except SystemExit as ended:  # told to, before the agent minds signals
        status = int(ended.code or 0)
    except SignalException as error:
        status = 128 + int(error.sigval)
    except TorchweftError as error:
        process.write_error(f"error: {error}\n")
    except BaseException as error:
        process.write_error(process.format_error(error))
    finally:
        # The ranks are gone; tearing torch down here would only take time.
        shutil.rmtree(folder, ignore_errors=True)
        process.flush_streams()
        _end_fork_server()
        os._exit(status)


def _drive(job: Job, folder: Path) -> int:
    store, endpoint = _host_store(job)
    try:
        _pass_notices_on(folder)
        with _following(job, folder):
            _launch(job, _config(job, endpoint, folder), folder)
        _tell_if_nobody_joined(job, folder)
    except ChildFailedError as error:
        failure = _describe(error, job, folder)
        process.write_error(f"torchweft: {failure}\n")
        if job.log_dir is not None:
            path = os.path.join(os.path.abspath(job.log_dir), f"rank-{failure.rank}.log")
            process.write_error(f"its output: {path}\n")
        return failure.exit_status
    finally:
        del store
    return 0


def _pass_notices_on(folder: Path) -> None:
    """What a scheduler sends before it ends a job is the ranks' to know."""

    def send(number: int, frame: FrameType | None) -> None:
        attempt = folder / "*" / f"attempt_{_last_attempt(folder)}" / "*"
        for file in _beside(attempt, process.stacks_file):
            stacks = process.read_stacks(file)
            if stacks is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stacks.pid, number)

    for number in process.NOTICE:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, send)


@contextlib.contextmanager
def _following(job: Job, folder: Path) -> Iterator[None]:
    """Show what the ranks write into their files, where that was asked for."""
    if job.tee is None:
        yield
        return
    follower = Follower(folder, None if job.tee == "all" else job.tee)
    try:
        yield
    finally:
        follower.stop()


def _tell_if_nobody_joined(job: Job, folder: Path) -> None:
    if job.processes > 1 and not any(
        folder.glob(f"*/attempt_*/*/{process.joined_file(Path('error.json'))}")
    ):
        process.write_error(
            f"torchweft: {job.script} ended well, but none of its {job.processes} processes made a "
            "Fabric: each ran the whole script by itself\n"
        )


def _end_fork_server() -> None:
    """Let go of it, and of the folder with its socket that ``multiprocessing`` made."""
    with contextlib.suppress(Exception):
        multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]


def _launch(job: Job, config: LaunchConfig, folder: Path) -> None:
    handoff = Handoff(
        run_id=job.run_id,
        launcher="torchrun",
        flags=job.flags,
        dry_run=job.dry_run,
        log_dir=_log_dir(job, folder),
        timeout=job.timeout,
        parent=os.getpid(),
    )
    if job.fresh:
        os.environ.update(handoff.to_environ())
        program = [*process.interpreter_flags(), "-c", _FRESH, str(folder), job.script]
        elastic_launch(config, sys.executable)(*program, *job.arguments)
        return
    script = Script(
        path=job.script,
        arguments=job.arguments,
        handoff=handoff,
        folder=str(folder),
        stdin=_stdin(),
    )
    # All ranks of a node are requested at once; the fork server answers one after another.
    os.environ.setdefault("TORCH_MP_PARALLEL_START", "1")
    elastic_launch(config, work)(script)


def _log_dir(job: Job, folder: Path) -> str:
    if job.log_dir is not None:
        return os.path.abspath(job.log_dir)
    # What is only shown need not stay.
    return str(folder / "output") if job.tee is not None else ""


def _config(job: Job, endpoint: str, folder: Path) -> LaunchConfig:
    least, most = job.num_nodes if isinstance(job.num_nodes, tuple) else (job.num_nodes,) * 2
    configs: dict[str, Any] = {}
    if (job.rdzv_backend or "static") == "static":
        configs["rank"] = job.node_rank
    return LaunchConfig(
        min_nodes=least,
        max_nodes=most,
        nproc_per_node=job.processes,
        run_id=job.run_id,
        rdzv_backend=job.rdzv_backend or "static",
        rdzv_endpoint=endpoint,
        rdzv_configs=configs,
        max_restarts=job.max_restarts,
        monitor_interval=0.05,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        local_addr="127.0.0.1" if most == 1 else None,
        **_signals(),
    )


def _signals() -> dict[str, Any]:
    """Those that the agent obeys: what ``nohup`` has switched off stays so."""
    names = ",".join(number.name for number in process.respected())
    # An older torch reads the variable alone, a newer one overwrites it.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = names
    known = {field.name for field in fields(LaunchConfig)}
    return {"signals_to_handle": names} if "signals_to_handle" in known else {}


def _host_store(job: Job) -> tuple[Any, str]:
    """On one node, listen on loopback before the agent would listen everywhere."""
    if job.rdzv_endpoint:
        return None, job.rdzv_endpoint
    address = job.main_address or "127.0.0.1"
    if job.num_nodes != 1:
        return None, f"{address}:{job.main_port or _PORT}"
    try:
        listener = socket.create_server((address, job.main_port or 0), backlog=1024)
    except OSError as error:
        raise TorchweftError(
            f"cannot listen on {address}:{job.main_port or 0}: {error.strerror}; choose another "
            "--main-port, or leave it out and a free one is taken"
        ) from error
    port = listener.getsockname()[1]
    store = TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )
    return store, f"{address}:{port}"


def _stdin() -> Stdin | None:
    try:
        os.fstat(0)
    except OSError:  # it was closed; the ranks have none either
        return None
    return Stdin(0)


def _describe(error: ChildFailedError, job: Job, folder: Path) -> RankFailed:
    """The first failure, with what is known of the other ranks of the last attempt."""
    # Who ended by itself; the agent counts those that it ended as failures too.
    codes = Marks(str(folder), _last_attempt(folder)).read()
    if not any(codes.values()):
        codes |= {rank: failure.exitcode for rank, failure in error.failures.items()}
    attempt = folder / "*" / f"attempt_{_last_attempt(folder)}" / "*"
    files: dict[int, Path] = {}
    for file in _beside(attempt, process.stacks_file):
        stacks = process.read_stacks(file)
        if stacks is not None:
            files[stacks.rank] = file
    for file in _beside(attempt, lambda file: file):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            files[json.loads(file.read_text())["message"]["extraInfo"]["rank"]] = file
    failures = [
        read_failure(rank, codes.get(rank, 1), files.get(rank, folder / "none"))
        for rank in sorted({*codes, *(rank for rank, file in files.items() if file.exists())})
        if codes.get(rank, 1) != 0
    ]
    most = job.num_nodes[1] if isinstance(job.num_nodes, tuple) else job.num_nodes
    done = {rank for rank, code in codes.items() if code == 0}
    for file in _beside(attempt, process.done_file):
        with contextlib.suppress(OSError, ValueError):
            done.add(int(process.done_file(file).read_text()))
    stacks_of = {rank: process.read_stacks(file) for rank, file in files.items()}
    meanwhile = {
        rank: stacks.doing()
        for rank, stacks in stacks_of.items()
        if stacks is not None and rank not in codes and rank not in done
    }
    return report(failures, most * job.processes, done, meanwhile)


def _beside(attempt: Path, named: Callable[[Path], Path]) -> list[Path]:
    """The error files beside which there is a file of that name."""
    pattern = named(attempt / "error.json")
    found = Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
    return [file.with_name("error.json") for file in found]


def _last_attempt(folder: Path) -> int:
    numbers = [int(path.name.rpartition("_")[2]) for path in folder.glob("*/attempt_*")]
    return max(numbers, default=0)


def _quieten() -> None:
    """The agent logs every rank that it ends; the failure is told once, here."""
    if "LOGLEVEL" in os.environ or os.environ.get("TORCHWEFT_TRACE") == "1":
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
