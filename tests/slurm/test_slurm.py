"""Runs under a real SLURM: two nodes, which are this computer."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from tests.endtoend.commands import SCRIPTS, Command, Result, clean_environment
from tests.endtoend.test_parity import alone, check  # noqa: F401
from tests.pages import Runner, blocks, environment
from tests.slurm.cluster import Cluster, running, why_not
from torchweft.builtin.launchers.meeting_point import PORTS
from torchweft.testing import LauncherConformance

PAGE = Path(__file__).parents[2] / "docs" / "slurm.md"
TRAIN = SCRIPTS / "train.py"
MEET = Path(__file__).parent / "scripts" / "meet.py"
TORCHWEFT = [sys.executable, "-m", "torchweft"]
#: What a run would be in that process, found out without torch.
PLAN = shlex.join([*TORCHWEFT, "plan", "--accelerator", "cpu"]) + " | head -n 1"

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is a SLURM")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """A SLURM that every command of this module finds."""
    with running() as started, pytest.MonkeyPatch.context() as patch:
        for name in [
            name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        ]:
            patch.delenv(name)
        for name, value in started.environ.items():
            patch.setenv(name, value)
        yield started


def run(
    *command: str | Path,
    text: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Result:
    """Run a command to its end, with an empty standard input or what is typed."""
    words = [str(word) for word in command]
    started = Command(words, clean_environment(environ), subprocess.PIPE, None)
    try:
        return started.finish(60, text or "")
    finally:
        started.kill()


def said(result: Result) -> list[str]:
    assert result.status == 0, result.err
    return sorted(result.lines)


# -- the same as one process -------------------------------------------------------------------


def test_the_batch_script_that_is_submitted_trains_as_one_process(
    cluster: Cluster,
    tmp_path: Path,
    alone: dict[str, torch.Tensor],  # noqa: F811
) -> None:
    path = tmp_path / "two words" / "model.ckpt"
    path.parent.mkdir()
    done = run(
        *TORCHWEFT,
        *["slurm", "--devices", "2", "--strategy", "ddp", "--job-name", 'a "job" #1'],
        *["--output", tmp_path / "out.txt", "--submit", TRAIN, "--", path],
    )
    (job,) = said(done)
    assert 'JobName=a "job" #1\n' in cluster.run("scontrol", "show", "job", job)
    cluster.wait_for(job)
    assert (tmp_path / "out.txt").read_text() == ""
    check(path, alone, ranks=2)


def test_ranks_on_two_nodes_train_as_one_process(
    tmp_path: Path,
    alone: dict[str, torch.Tensor],  # noqa: F811
) -> None:
    path = tmp_path / "model.ckpt"
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1"]
    # The nodes have no names that anybody could look up.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this computer has no address but loopback")
        where = {"MASTER_ADDR": probe.getsockname()[0]}
    assert said(run(*srun, sys.executable, TRAIN, path, environ=where)) == []
    check(path, alone, ranks=2)


# -- who is a rank -----------------------------------------------------------------------------

INLINE = "single_device on 1 x cpu, 32-true, launched by inline"


def test_the_tasks_of_a_batch_job_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    one = "srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1"
    script = [
        "#!/bin/sh",
        "#SBATCH --nodes=2 --ntasks-per-node=2",
        PLAN,
        f"srun sh -c {shlex.quote(f'{PLAN}; true')}",
        f"{one} sh -c {shlex.quote(PLAN)}",
        # As a notebook's kernel is started.
        f"{one} setsid -w sh -c {shlex.quote(PLAN)}",
        "",
    ]
    batch = tmp_path / "job.sh"
    batch.write_text("\n".join(script))
    out = tmp_path / "out.txt"
    cluster.wait_for(cluster.run("sbatch", "--parsable", f"--output={out}", str(batch)))
    assert out.read_text().splitlines() == [
        INLINE,
        *["ddp on 2 x cpu on each of 2 nodes, 32-true, launched by slurm"] * 4,
        "single_device on 1 x cpu, 32-true, launched by slurm",
        INLINE,
    ]


def typed(shell: str, *lines: str) -> list[str]:
    """What plans say in a shell that SLURM opened on a terminal, and in which somebody types."""
    said = run(
        *["script", "-qec", shell, "/dev/null"],
        text="\n".join([*lines, "exit", ""]),
        environ={"TERM": "dumb", "PS1": "", "SHELL": "/bin/sh"},
    ).out
    return re.findall(r"\w+ on .* launched by \w+", said)


@pytest.mark.parametrize(
    "shell",
    [
        "srun --ntasks=2 --pty sh",
        # On a node of the job, in a step of its own kind.
        "salloc --ntasks=2",
        # Where the command was given.
        "salloc --ntasks=2 sh",
    ],
)
def test_by_hand_in_a_shell_of_slurms(shell: str) -> None:
    # What srun reads itself is not typed to the shell.
    srun = f"srun --overlap --ntasks=2 sh -c {shlex.quote(PLAN)} < /dev/null"
    assert typed(shell, PLAN, srun) == [
        INLINE,
        *["ddp on 2 x cpu, 32-true, launched by slurm"] * 2,
    ]


# -- what contradicts SLURM --------------------------------------------------------------------


def refused(*command: str, **environ: str) -> str:
    """What tasks that fail say, where all of them say the same."""
    result = run(*command, environ=environ)
    assert result.status != 0, result.out
    said = re.findall(r"^(?:error|torchweft\.errors\.\w+): (.*)$", result.err, re.MULTILINE)
    assert len(set(said)) == 1, result.err
    return str(said[0])


def test_another_number_of_devices_than_tasks() -> None:
    code = "from torchweft import Fabric; Fabric(accelerator='cpu', devices=4, strategy='ddp')"
    words = (
        "devices=4 with strategy 'ddp' needs 4 process(es) per node, but srun started {n} task(s) "
        "with {n} per node; write '#SBATCH --ntasks-per-node=4' in place of {n} (or that option of "
        "srun), or leave devices out"
    )
    assert refused("srun", sys.executable, "-c", code) == words.format(n=1)
    flags = ["--accelerator=cpu", "--devices=4", "--strategy=ddp"]
    assert refused("srun", "--ntasks=2", *TORCHWEFT, "plan", *flags) == words.format(n=2)


def test_another_number_of_nodes() -> None:
    flags = ["--accelerator", "cpu", "--num-nodes", "3"]
    words = (
        "num_nodes=3 was asked for, but srun started {n} task(s) on {n} node(s); write "
        "'#SBATCH --nodes=3' in place of {n} (or that option of srun), or leave num_nodes out"
    )
    assert refused("srun", "--nodes=2", *TORCHWEFT, "plan", *flags) == words.format(n=2)
    # The command hands it on, and does not ask for --devices where the ranks are there.
    assert refused("srun", *TORCHWEFT, "run", *flags, str(MEET), "well", ".") == words.format(n=1)


def test_different_numbers_of_tasks() -> None:
    assert refused("srun", "--nodes=2", "--ntasks=3", *TORCHWEFT, "plan") == (
        "srun started 3 task(s), but not the same number on every node: 2, 1 on "
        "weft-[1-2]; write '#SBATCH --ntasks-per-node=2' in place of --ntasks=3 (or that option "
        "of srun)"
    )


def test_a_command_that_makes_processes_in_every_task() -> None:
    assert refused("srun", "--ntasks=2", *TORCHWEFT, "run", "--devices=2", str(MEET)) == (
        "--devices makes a node of this process, of 1 in all (--num-nodes), but srun started 2 "
        "task(s), which would make 2 nodes; leave --devices out, and each of them is a rank, or "
        "start one on each node and give --num-nodes"
    )


# -- where ranks meet --------------------------------------------------------------------------


def test_the_name_of_a_node_that_does_not_resolve() -> None:
    words = refused("srun", "--nodes=2", sys.executable, str(MEET), "well", ".")
    assert words.startswith(
        "the address of rank 0, 'weft-1' (the first node of SLURM_STEP_NODELIST=weft-[1-2]), does "
        f"not resolve on {socket.gethostname()}: "
    )


def test_a_port_that_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        srun = ["srun", "--kill-on-bad-exit=1", "--ntasks=2", sys.executable, str(MEET)]
        # The other rank, which waits at the port of a stranger, is ended with it.
        assert refused(*srun, "well", ".", MASTER_PORT=str(port)) == (
            f"port {port} of {socket.gethostname()}, on which rank 0 is to serve the run's store, "
            "is in use; MASTER_PORT chose it; choose another for all ranks: export MASTER_PORT=…, "
            "before srun"
        )


# -- how it ends -------------------------------------------------------------------------------


def test_a_rank_that_fails_ends_the_job_and_is_told_once(tmp_path: Path) -> None:
    result = run(
        *["srun", "--kill-on-bad-exit=1", "--ntasks=2", sys.executable, MEET, "fail", tmp_path]
    )
    # The highest of all tasks: the other one was ended by a signal.
    assert result.status in (1, 143)
    assert result.err.count("Traceback") == 1, result.err
    assert result.err.count("ValueError: the last rank has had enough\n") == 1
    # They met on loopback, where nobody else can come.
    told = [re.fullmatch(r"rank (\d) of 2: (\S+) (\d+) (.+) sum 3", line) for line in result.lines]
    assert sorted(match.group(1, 2, 4) for match in told if match) == [
        ("0", "127.0.0.1", "['0100007F']"),
        ("1", "127.0.0.1", "['0100007F']"),
    ]
    (port,) = {int(match.group(3)) for match in told if match}
    assert port in PORTS


def wait_for(paths: list[Path], out: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, out.read_text()
        time.sleep(0.05)


def test_a_job_that_is_started_again_and_told_that_the_time_is_over(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The batch script gets the signal, and hands it on."""
    out = tmp_path / "out.txt"
    flags = ["--devices=2", "--signal=B:USR1@60", "--requeue", "--submit", "--output", out]
    (job,) = said(run(*TORCHWEFT, "slurm", *flags, MEET, "wait", tmp_path))
    steps = []
    for run_of_job in (0, 1):
        ready, stopped = (
            [tmp_path / f"{word}-{rank}-{run_of_job}" for rank in (0, 1)]
            for word in ("ready", "stopped")
        )
        wait_for(ready, out)
        if run_of_job == 0:
            cluster.requeue(job)  # SIGTERM for the ranks
        else:
            cluster.run("scancel", "--batch", "--signal=USR1", job)
        wait_for(stopped, out)
        steps.append({path.read_text() for path in stopped})
    cluster.wait_for(job)
    assert [len(step) for step in steps] == [1, 1]  # both ranks at the same one
    assert "ExitCode=0:0" in cluster.run("scontrol", "show", "job", job)


def test_what_sbatch_refuses() -> None:
    result = run(*TORCHWEFT, "slurm", "--partition", "elsewhere", "--submit", TRAIN)
    assert (result.status, result.out) == (1, "")
    assert re.fullmatch(
        r"error: sbatch \(/\S+/sbatch\) refused the job with status 1 and said: sbatch: error: "
        r"invalid partition specified: elsewhere .*; leave --submit out to see the script\n",
        result.err,
    )


# -- the page ----------------------------------------------------------------------------------


def test_every_code_block_of_the_page(cluster: Cluster, tmp_path: Path) -> None:
    runner = Runner(tmp_path, environment(PYTHONWARNINGS="error"))
    for block in blocks(PAGE):
        # The rest is an excerpt of a batch script, and what belongs into train.py.
        if block.word == "console" or block.file:
            runner.run(block)
        elif block.word == "python":
            compile(block.text, block.place, "exec")
    # What the page has submitted, which is the last job.
    job = max(cluster.run("squeue", "--noheader", "--format=%i").split(), key=int)
    cluster.wait_for(job)
    assert (tmp_path / "out.txt").read_text() == "2 ranks by slurm\n"


def test_the_page_says_the_ports() -> None:
    text = PAGE.read_text("utf-8")
    assert f"{PORTS[0]} to {PORTS[-1]}" in text


class TestSlurm(LauncherConformance):
    launcher = "slurm"
    command = (
        "srun",
        "--kill-on-bad-exit=1",
        "--quit-on-interrupt",
        "--ntasks={n}",
        "{python}",
        "{script}",
    )
