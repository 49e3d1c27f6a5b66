"""Drives torch's elastic agent for ``torchweft run``, and tells the first failure once."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from torchweft.builtin.launchers.agent_rank import Script, Stdin, work
from torchweft.errors import RankFailed, TorchweftError
from torchweft.failures import Failure, read_failure, report
from torchweft.handoff import Handoff

if TYPE_CHECKING:
    from torchweft.cli.run import Job

__all__ = ["drive"]

#: The port on which nodes meet when none is named, as torchrun's c10d.
_PORT = 29400


def drive(job: Job) -> NoReturn:
    """Run the job to its end and end this process with its status."""
    _quieten()
    folder = Path(tempfile.mkdtemp(prefix="torchweft-"))
    status = 0
    try:
        store, endpoint = _host_store(job)
        config = _config(job, endpoint, folder)
        try:
            _launch(job, config)
        except ChildFailedError as error:
            failure = _describe(error, job, folder)
            sys.stderr.write(f"torchweft: {failure}\n")
            status = failure.exit_status
        except SignalException as error:
            status = 128 + int(error.sigval)
        del store
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # The ranks are gone; tearing torch down here would only take time.
    os._exit(status)


def _launch(job: Job, config: LaunchConfig) -> None:
    if job.fresh:
        handoff = Handoff(
            run_id=job.run_id, launcher="torchrun", flags=job.flags, parent=os.getpid()
        )
        os.environ.update(handoff.to_environ())
        program = ["-m", "torchweft.fresh", job.script, *job.arguments]
        elastic_launch(config, sys.executable)(*program)
        return
    script = Script(
        path=job.script,
        arguments=job.arguments,
        run_id=job.run_id,
        flags=job.flags,
        stdin=_stdin(),
    )
    # All ranks of a node are requested at once; the fork server answers one after another.
    os.environ.setdefault("TORCH_MP_PARALLEL_START", "1")
    elastic_launch(config, work)(script)


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
    )


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
    """The first failure, with what the ranks of the last attempt left in their error files."""
    found: dict[int, Failure] = {}
    attempts = sorted(
        folder.glob("*/attempt_*"), key=lambda path: int(path.name.rpartition("_")[2])
    )
    for file in attempts[-1].glob("*/error.json") if attempts else ():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            rank = int(json.loads(file.read_text())["message"]["extraInfo"]["rank"])
            found[rank] = read_failure(rank, 1, file)
    for rank, failure in error.failures.items():
        exitcode = failure.exitcode
        earlier = found.get(rank)
        if earlier is None:
            found[rank] = Failure(rank=rank, exitcode=exitcode)
    least = job.num_nodes[1] if isinstance(job.num_nodes, tuple) else job.num_nodes
    return report(list(found.values()), least * job.processes)


def _quieten() -> None:
    """The agent logs every rank that it ends; the failure is told once, here."""
    if "LOGLEVEL" in os.environ or os.environ.get("TORCHWEFT_TRACE") == "1":
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
