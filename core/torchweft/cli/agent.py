"""Drives torch's elastic agent for ``torchweft run``, and tells the first failure once."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from torchweft import process
from torchweft.builtin.launchers.agent_rank import Script, Stdin, work
from torchweft.cli.attempts import NOBODY_TOLD, Attempts
from torchweft.cli.following import Follower
from torchweft.cli.fork_server import end_fork_server
from torchweft.cli.nodes import Meeting, meet
from torchweft.cli.rounds import agent_of
from torchweft.cli.run import AGENT
from torchweft.cli.tidings import Tidings
from torchweft.errors import InvalidRequest, RankFailed, TorchweftError
from torchweft.failures import first_failure
from torchweft.handoff import Handoff

if TYPE_CHECKING:
    from torchweft.cli.run import Job

__all__ = ["drive"]

#: A fresh rank looks for nothing in the current folder, where files may hide a library.
_FRESH = (
    "import sys; sys.path[:1] = sys.path[:1] if sys.path[0] else []; "
    "from torchweft.fresh import main; main()"
)


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
        status = 2 if isinstance(error, InvalidRequest) else 1
        process.write_error(f"error: {error}\n")
    except BaseException as error:
        process.write_error(process.format_error(error))
    finally:
        # The ranks are gone; tearing torch down here would only take time.
        shutil.rmtree(folder, ignore_errors=True)
        process.flush_streams()
        end_fork_server()
        os._exit(status)


def _drive(job: Job, folder: Path) -> int:
    meeting = meet(job)
    attempts = Attempts(folder, job)
    notices = _Notices(job, attempts)
    elastic = bool(job.rdzv_endpoint)
    tidings = _tidings(job, meeting, notices)
    try:
        _meet_anew(job)
        with (
            _following(job, folder),
            agent_of(
                attempts,
                elastic=elastic,
                leaving=lambda: notices.told,
                heard=lambda: tidings.news is not None,
            ),
        ):
            _launch(job, _config(job, meeting, folder), folder, _network(meeting))
        tidings.well = True
        if not attempts.begun:
            process.write_error(
                "torchweft: the run ended without this node, which was one too many\n"
            )
            return 0
        _tell_if_nobody_joined(job, folder)
        if notices.told:
            return 128 + signal.SIGTERM
    except ChildFailedError as error:
        failures = attempts.failures(error.failures)
        failure = attempts.report(failures)
        _tell(failure, tidings, lost=first_failure(failures).lost_peer, waited=elastic)
        process.write_error(attempts.output_of(failure))
        return failure.exit_status
    except SignalException as error:
        if tidings.news is not None:
            process.write_error(f"torchweft: {tidings.news}\n")
            return 1
        if isinstance(job.num_nodes, int):  # the others of an elastic run go on
            name = signal.Signals(error.sigval).name
            tidings.fail(f"{_this_node(job)} was told to end by {name}")
        raise
    except RendezvousError as error:
        # The node that served it may have gone because it failed.
        if tidings.cause() is None:
            raise TorchweftError(_never_met(job, error)) from error
        process.write_error(f"torchweft: {tidings.news}\n")
        return 1
    except SystemExit:  # told to, before the agent minds signals
        tidings.fail(f"{_this_node(job)} was told to end")
        raise
    except Exception as error:
        tidings.fail(f"{_this_node(job)} could not go on: {type(error).__name__}: {error}")
        raise
    finally:
        tidings.close()
        meeting.store = None
    return 0


def _tidings(job: Job, meeting: Meeting, notices: _Notices) -> Tidings:
    node = str(job.node_rank)
    if job.num_nodes == 1 or meeting.join is None:
        return Tidings(None, node, notices.end_now, serves=True)
    if job.rdzv_endpoint:  # where they get other numbers in every round
        node = f"{socket.gethostname()}:{os.getpid()}"
        return Tidings(meeting.join, node, notices.end_now, serves=meeting.serves)
    assert isinstance(job.num_nodes, int)
    serves, nodes = meeting.serves, job.num_nodes
    return Tidings(meeting.join, node, notices.end_now, serves=serves, nodes=nodes)


def _this_node(job: Job) -> str:
    if job.rdzv_endpoint:
        return f"a node ({socket.gethostname()})"
    return f"node {job.node_rank} of {job.num_nodes}"


def _tell(failure: RankFailed, tidings: Tidings, *, lost: bool, waited: bool) -> None:
    """Tell the failure here, and its headline to the other nodes; theirs is the cause, if any."""
    text = str(failure)
    # The agent of an elastic run has waited for another node already.
    news = tidings.cause(waited=waited) if lost else None
    headline, blank, trace = text.partition("\n\n")
    if news is not None:
        text = f"{news}\nhere {text.splitlines()[0]}"
    else:
        tidings.fail(headline)
        if lost and tidings.shared:
            headline += f"\n{NOBODY_TOLD}"
            text = f"{headline}{blank}{trace}"
    process.write_error(f"torchweft: {text}\n")


def _never_met(job: Job, error: RendezvousError) -> str:
    least = job.num_nodes[0] if isinstance(job.num_nodes, tuple) else job.num_nodes
    where = f"--rdzv-endpoint {job.rdzv_endpoint}" if job.rdzv_endpoint else "--main-address"
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"fewer than {least} nodes had met at {where} after {job.join_timeout:g} s "
            "(--join-timeout); start the same command on the others, or lower --num-nodes to what "
            "there is"
        )
    # torch's own text says no more than to look at what caused it.
    why, _, _ = str(error.__cause__ or error).partition("\n")
    return (
        f"the nodes could not meet at {where}: {why}; one of them has that address and listens "
        "there, and every other one has to reach it"
    )


class _Notices:
    """Tells the ranks what is theirs to know: that the job is about to end, or shall.

    torch's agent would end its ranks and go, and the agents of other nodes, whose ranks stop at the
    same step, would wait for it for minutes.

    Attributes:
        told: whether the job was told to end and its ranks leave by themselves.
    """

    def __init__(self, job: Job, attempts: Attempts) -> None:
        self.told = False
        self._at_once = False
        self._processes = job.processes
        self._attempts = attempts
        for number in (*process.NOTICE, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._end if number == signal.SIGTERM else self._send)

    def end_now(self) -> None:
        """From any thread: end the ranks, whatever they mind, and the agent."""
        self._at_once = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _send(self, number: int, frame: FrameType | None) -> None:
        for file in self._attempts.beside(process.stacks_file):
            stacks = process.read_stacks(file)
            if stacks is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stacks.pid, number)

    def _end(self, number: int, frame: FrameType | None) -> None:
        minding = self._attempts.beside(process.minding_file)
        if self._at_once or self.told or len(minding) < self._processes:
            raise SignalException(f"process {os.getpid()} got {number}", signal.Signals(number))
        self.told = True
        # Who is told again does not ask again.
        again = threading.Timer(process.LONG_GRACE, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        self._send(number, frame)


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


def _network(meeting: Meeting) -> dict[str, str]:
    """What ranks on several nodes are told of the network, unless the user did."""
    # gloo goes by the computer's name, which often means loopback.
    told = {"GLOO_SOCKET_IFNAME": meeting.interface} if meeting.interface else {}
    return {name: value for name, value in told.items() if name not in os.environ}


def _meet_anew(job: Job) -> None:
    """Have torch's agent tell every round of a rendezvous where rank 0's store is.

    It would tell the first round alone, so that a node which comes later waits for it in vain, and
    one that stays goes on to ask a node that has gone.
    """
    if job.rdzv_endpoint:
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def _launch(job: Job, config: LaunchConfig, folder: Path, environ: dict[str, str]) -> None:
    handoff = Handoff(
        run_id=job.run_id,
        launcher=AGENT,
        flags=job.flags,
        dry_run=job.dry_run,
        log_dir=_log_dir(job, folder),
        log_stays=job.log_dir is not None,
        timeout=job.timeout,
        parent=os.getpid(),
    )
    if job.fresh:
        os.environ.update({**environ, **handoff.to_environ()})
        what = ["-m", job.script] if job.module else [job.script]
        program = [*process.interpreter_flags(), "-c", _FRESH, str(folder), *what]
        elastic_launch(config, sys.executable)(*program, *job.arguments)
        return
    script = Script(
        path=job.script,
        module=job.module,
        arguments=job.arguments,
        handoff=handoff,
        folder=str(folder),
        stdin=_stdin(),
        environ=environ,
    )
    # All ranks of a node are requested at once; the fork server answers one after another.
    os.environ.setdefault("TORCH_MP_PARALLEL_START", "1")
    elastic_launch(config, work)(script)


def _log_dir(job: Job, folder: Path) -> str:
    if job.log_dir is not None:
        return os.path.abspath(job.log_dir)
    # What is only shown need not stay.
    return str(folder / "output") if job.tee is not None else ""


def _config(job: Job, meeting: Meeting, folder: Path) -> LaunchConfig:
    least, most = job.num_nodes if isinstance(job.num_nodes, tuple) else (job.num_nodes,) * 2
    return LaunchConfig(
        min_nodes=least,
        max_nodes=most,
        nproc_per_node=job.processes,
        run_id=job.run_id,
        rdzv_backend=job.rdzv_backend or "static",
        rdzv_endpoint=meeting.endpoint,
        rdzv_configs=meeting.configs,
        max_restarts=job.max_restarts,
        monitor_interval=0.05,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        local_addr="127.0.0.1" if most == 1 else meeting.address or None,
        **_signals(),
    )


def _signals() -> dict[str, Any]:
    """Those that the agent obeys: what ``nohup`` has switched off stays so."""
    # SIGTERM is minded here.
    minded = [number for number in process.respected() if number != signal.SIGTERM]
    names = ",".join(number.name for number in minded)
    # An older torch reads the variable alone, a newer one overwrites it.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = names
    known = {field.name for field in fields(LaunchConfig)}
    return {"signals_to_handle": names} if "signals_to_handle" in known else {}


def _stdin() -> Stdin | None:
    try:
        os.fstat(0)
    except OSError:  # it was closed; the ranks have none either
        return None
    return Stdin(0)


def _quieten() -> None:
    """The agent logs every rank that it ends; the failure is told once, here."""
    if "LOGLEVEL" in os.environ or os.environ.get("TORCHWEFT_TRACE") == "1":
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
