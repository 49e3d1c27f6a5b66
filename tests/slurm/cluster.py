"""A SLURM of its own: munged, slurmctld and a slurmd for each node, in a folder that goes with it.

Nothing of the system's is used. Everything listens on loopback; the nodes are this computer.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchweft.testing.commands import MARK, marked

__all__ = ["NODES", "Cluster", "running", "why_not"]

#: Names that mean nothing to anybody but SLURM.
NODES = ("weft-1", "weft-2")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "salloc", "scontrol", "setpriv")
_PATIENCE = 20.0

# More processors than there are, so that jobs need not wait for each other. A port follows from a
# job's number: those of another cluster on this computer, which may run at once, are others.
_CONFIGURATION = """
ClusterName=weft
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
FirstJobId={controller}00
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=1,batch_sched_delay=0
LaunchParameters=use_interactive_step
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=3
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why there can be no such cluster here; empty where there can."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
    if sys.platform != "linux" or missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd is started as root"


def _path() -> str:
    """A user's PATH may lack the folder of daemons."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """A running SLURM of two nodes.

    Attributes:
        environ: variables by which commands find it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._mark = uuid.uuid4().hex
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start all daemons, and wait until the nodes take jobs."""
        controller, *ports = _free_ports(1 + len(NODES))
        lines = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=16"
            for name, port in zip(NODES, ports, strict=True)
        ]
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder, controller=controller, nodes="\n".join(lines)
            ).lstrip()
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {
            "key-file": key,
            "socket": self.folder / "munge.socket",
            "pid-file": self.folder / "munged.pid",
            "log-file": self.folder / "munged.log",
            "seed-file": self.folder / "munge.seed",
        }
        self._daemon("munged", "--foreground", *(f"--{k}={path}" for k, path in files.items()))
        self._until("munged answers", (self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D", "-i")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        idle = ("sinfo", "--noheader", "--format=%D %t")
        self._until("all nodes are idle", lambda: self.run(*idle) == f"{len(NODES)} idle")

    def run(self, *command: str) -> str:
        """What a command of SLURM printed; empty where it failed."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.environ},
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def wait_for(self, job: str) -> None:
        """Until a job has left the queue, however it ended."""
        self._until(
            f"job {job} has ended",
            lambda: (
                self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "-o%t")
                in ("", "CD", "F", "CA", "TO")
            ),
            patience=60,
        )

    def requeue(self, job: str) -> None:
        """Have a job started again, and at once, which SLURM does after two minutes."""
        self.run("scontrol", "requeue", job)
        state = ("squeue", "--noheader", f"--jobs={job}", "--format=%r")
        self._until(f"job {job} waits", lambda: self.run(*state) == "BeginTime")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def stop(self) -> None:
        """End every job, then the daemons and whatever they started."""
        with suppress(subprocess.TimeoutExpired, AssertionError):
            jobs = self.run("squeue", "--noheader", "--format=%i").split()
            if jobs:
                self.run("scancel", "--signal=KILL", "--full", *jobs)
                self.run("scancel", *jobs)
                self._until("no job runs", lambda: not self.run("squeue", "--noheader"))
        for pid in marked(self._mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons:
            daemon.wait()

    def _daemon(self, name: str, *arguments: str) -> None:
        """It dies with these tests, however they end."""
        program = shutil.which(name, path=_path())
        assert program is not None
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", program, *arguments],
                    env={**os.environ, **self.environ, MARK: self._mark},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _until(self, what: str, answer: Callable[[], bool], patience: float = _PATIENCE) -> None:
        deadline = time.monotonic() + patience
        while not answer():
            assert time.monotonic() < deadline, f"not within {patience:g} s: {what}{self._said()}"
            time.sleep(0.05)

    def _said(self) -> str:
        files = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
        return "".join(f"\n--- {path.name}\n{path.read_text()[-2000:]}" for path in files)


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@contextmanager
def running() -> Iterator[Cluster]:
    """A cluster, of which nothing is left afterwards."""
    # munged wants a folder that everybody may enter, which pytest's are not.
    folder = Path(tempfile.mkdtemp(prefix="weft-slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
