"""``torchweft run``: flags against arguments, and wrong uses of it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.endtoend.commands import SCRIPTS

RUN = [sys.executable, "-m", "torchweft", "run"]
SCRIPT = SCRIPTS / "flags.py"


def said(result) -> list:
    assert result.status == 0, result.err
    return sorted(json.loads(line) for line in result.lines)


@pytest.mark.parametrize("devices", [["--devices", "2"], []], ids=["agent", "script"])
def test_flags_fill_in_what_the_script_leaves_open(devices: list[str], run) -> None:
    arguments = {} if devices else {"devices": 2}
    result = run(
        *RUN,
        *devices,
        "--accelerator",
        "cpu",
        "--strategy",
        "ddp:static_graph=true",
        "--precision",
        "bf16-mixed",
        SCRIPT,
        json.dumps(arguments),
    )
    launcher = "torchrun" if devices else "script"
    assert said(result) == [
        [rank, 2, "ddp", "bf16-mixed", launcher, {"static_graph": True}] for rank in (0, 1)
    ]


def test_equal_in_other_words(run) -> None:
    result = run(*RUN, "--devices", "2", SCRIPT, '{"devices": 2, "num_nodes": 1}')
    assert [row[0] for row in said(result)] == [0, 1]


@pytest.mark.parametrize(
    ("flags", "arguments", "both"),
    [
        (["--strategy", "ddp"], {"strategy": "single_device"}, ["'ddp'", "'single_device'"]),
        (["--precision", "64-true"], {"precision": "32-true"}, ["'64-true'", "'32-true'"]),
    ],
)
def test_a_flag_and_an_argument_that_disagree(
    flags: list[str], arguments: dict, both: list[str], run
) -> None:
    result = run(*RUN, *flags, SCRIPT, json.dumps(arguments))
    assert result.status == 1
    assert f"{flags[0]} says {both[0]}" in result.err
    assert f"{next(iter(arguments))}={both[1]}" in result.err


def test_devices_that_disagree_are_told_once(run) -> None:
    result = run(*RUN, "--devices", "2", SCRIPT, '{"devices": 4}')
    assert result.status == 1
    # The other rank says the same, or was ended before it could.
    told = r"rank [01] of 2 failed: InvalidRequest: --devices says 2 and the script says"
    assert re.search(told, result.err)
    assert result.err.count("Traceback") == 1
    # The frames inside torchweft say nothing that the message does not.
    assert "resolve.py" not in result.err


def test_torchrun_against_the_script(run) -> None:
    result = run(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        SCRIPT,
        '{"devices": 4, "strategy": "ddp"}',
    )
    assert result.status == 1
    assert "needs 4 process(es) per node, but torchrun started this process with 2" in result.err


WRONG = [
    (["nothing.py"], 2, "script 'nothing.py' does not exist"),
    (["--devices", "2", "nothing.py"], 2, "script 'nothing.py' does not exist"),
    (["."], 2, "script '.' is a folder"),
    (["--max-restarts", "3", "SCRIPT"], 2, "--max-restarts without --devices"),
    (["--num-nodes", "2", "SCRIPT"], 2, "--num-nodes without --devices"),
    (["--rdzv-backend", "c10d", "SCRIPT"], 2, "--rdzv-backend without --devices"),
    (["--device", "2", "SCRIPT"], 2, "no option --device; did you mean '--devices'?"),
    (["--devices", "0", "SCRIPT"], 2, "0"),
    (["--devices", "-3", "SCRIPT"], 2, "-3"),
    (["--devices", "two", "SCRIPT"], 2, "devices='two' is not understood"),
    (
        ["--devices", "2", "--strategy", "dpd", "SCRIPT"],
        2,
        "'dpd' (--strategy); did you mean 'ddp'?",
    ),
    (["--devices", "2", "--accelerator", "cup", "SCRIPT"], 2, "did you mean 'cpu'?"),
    (["--devices", "2", "--precision", "8-true", "SCRIPT"], 2, "no precision is called '8-true'"),
    (["--devices", "2", "--strategy", "ddp:find_unused=1", "SCRIPT"], 2, "find_unused_parameters"),
    (
        ["--devices", "2", "--accelerator", "cuda", "SCRIPT"],
        1,
        "'cuda' (--accelerator) cannot be used here",
    ),
    (["--devices", "2", "--strategy", "xla_fsdp", "SCRIPT"], 1, "pip install torchweft-xla"),
    (["--devices", "2", "--num-nodes", "2", "SCRIPT"], 2, "add --main-address"),
    (["--devices", "2", "--num-nodes", "1:2", "SCRIPT"], 2, "--rdzv-backend c10d"),
    (["--devices", "2", "--node-rank", "1", "SCRIPT"], 2, "--node-rank 1 is not one of 0 to 0"),
    (["-m", "package/train.py"], 2, "-m takes a module's name, such as package.train; 'package/"),
    (["package.train"], 2, "'package.train' does not exist (looked in"),
    (["package.train"], 2, "; a module is run with -m package.train"),
    (
        ["--launcher", "spawn", "--max-restarts", "1", "--tee", "0", "SCRIPT"],
        2,
        "--max-restarts and --tee with --launcher spawn: that is for torch's agent, which makes",
    ),
    (
        ["--devices", "2", "-m", "torchweft.nothing.train"],
        2,
        "no module is called 'torchweft.nothing.train' (-m): there is no torchweft.nothing in /",
    ),
    (["--devices", "2", "-m", "json.tool.py"], 2, "(-m): json.tool is no package in /"),
    (["-m", "torchweft.data"], 2, "-m torchweft.data is a package without a module __main__, wh"),
    (["--devices", "2", "--tee", "1,2", "SCRIPT"], 2, "--tee 2: there are ranks 0 to 1 (--devices"),
    (
        ["--devices", "2", "--log-dir", "/dev/null", "SCRIPT"],
        2,
        "--log-dir /dev/null: no file can be written there (File exists); name a folder that is y",
    ),
    (
        ["--launcher", "slurm", "--devices", "2", "SCRIPT"],
        1,
        (
            "makes the processes from outside, and did not start this command; start the script "
            "with 'srun -n 2 python train.py'"
        ),
    ),
    (["--launcher", "spwan", "SCRIPT"], 2, "no launcher is called 'spwan' (--launcher); did you"),
]


@pytest.mark.parametrize("flag", ["--timeout", "--join-timeout"])
@pytest.mark.parametrize("seconds", ["inf", "nan", "1e12"])
def test_a_time_that_never_ends(flag: str, seconds: str, run) -> None:
    result = run(*RUN, "--devices", "2", flag, seconds, SCRIPT, "{}")
    assert result.status == 2
    assert (
        f"Invalid value for '{flag}': {seconds} is no number of seconds up to 31622400, a year"
    ) in result.err


@pytest.mark.parametrize(("arguments", "status", "words"), WRONG)
def test_wrong_use_is_told_before_any_process_starts(
    arguments: list[str], status: int, words: str, run
) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here, which makes this a right use")
    command = [str(SCRIPT) if a == "SCRIPT" else a for a in arguments]
    result = run(*RUN, *command, "{}")
    assert result.status == status, result.err
    assert words in result.err
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("train.sh", b"#!/bin/bash\ntrue\n", "a program for /bin/bash; let it call this command"),
        ("train.ipynb", b"{}", "a notebook; save it as a script"),
        ("train", b"\x7fELF\0\0", "no text; name the Python source"),
    ],
)
def test_what_is_not_python(name: str, content: bytes, what: str, run, tmp_path: Path) -> None:
    script = tmp_path / name
    script.write_bytes(content)
    result = run(*RUN, "--devices", "2", script)
    assert (result.status, result.out) == (2, "")
    assert f"script '{script}' is not Python: it is {what}" in result.err
    assert result.err.endswith("A module is run with -m package.module\n")


def test_what_python_runs_is_python(run, tmp_path: Path) -> None:
    """Whatever its first line means to a shell, and whether or not it could be imported."""
    script = tmp_path / "01_train.py"
    script.write_text("#!/usr/bin/env -S uv run --script\nprint(__name__)\n")
    assert run(*RUN, "--devices", "1", script).out == "__main__\n"
    assert run(*RUN, "--devices", "1", "-m", "01_train", cwd=tmp_path).out == "__main__\n"
    refused = run(*RUN, "--devices", "1", "-m", "./01_train.py", cwd=tmp_path)
    assert refused.err.startswith("error: -m takes a module's name, such as package.train; './01_")


@pytest.mark.parametrize("more", [["--devices", "2"], ["--devices", "2", "--no-preload"], []])
def test_a_module(more: list[str], run, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "other.py").write_text("NAME = 'other'\n")
    (package / "train.py").write_text(
        "import sys\n"
        "from torchweft import Fabric\n"
        "from .other import NAME\n"
        "fabric = Fabric(accelerator='cpu')\n"
        "fabric.launch()\n"
        "print(f'{fabric.world_size} {NAME} {__name__} {sys.argv[1:]}\\n', end='')\n"
    )
    result = run(*RUN, *more, "-m", "package.train", "a", cwd=tmp_path)
    ranks = 2 if more else 1
    assert result.lines == [f"{ranks} other __main__ ['a']"] * ranks, result.err


def test_another_launcher(run, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from torchweft import Fabric\n"
        "def train(fabric):\n"
        "    return int(fabric.all_reduce(fabric.global_rank, reduce_op='sum'))\n"
        "if __name__ == '__main__':\n"
        "    fabric = Fabric(accelerator='cpu', strategy='ddp')\n"
        "    print(fabric.plan.launcher.name, fabric.launch(train))\n"
    )
    result = run(*RUN, "--launcher", "forkserver", "--devices", "3", script)
    assert (result.status, result.out) == (0, "forkserver 3\n"), result.err


def test_several_processes_that_no_strategy_here_can_serve(run) -> None:
    """Whatever the script names, so that no process is started to find it out."""
    environ = {"TORCHWEFT_DISABLE_PLUGINS": "cuda"}
    result = run(*RUN, "--devices", "2", SCRIPT, "{}", environ=environ)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: no strategy can be used here: 'single_device' ")
    assert "plugin 'cuda' (torchweft-cuda 0.1.0) is disabled" in result.err


@pytest.mark.parametrize("ours", [True, False])
def test_a_stale_variable_changes_nothing(ours: bool, run) -> None:
    stale = {
        "run_id": "old",
        "launcher": "torchrun",
        "flags": {"precision": "64-true"},
        "pid": 1,
        "parent": None,
    }
    environ = {"TORCHWEFT_RUN": json.dumps(stale)}
    if ours:
        # What a rank's own child processes inherit.
        environ |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "old"}
    result = run(sys.executable, SCRIPT, '{"accelerator": "cpu"}', environ=environ)
    assert said(result) == [[0, 1, "single_device", "32-true", "inline", {}]]


def test_a_program_that_a_rank_starts_is_not_that_rank(run, tmp_path: Path) -> None:
    script = tmp_path / "outer.py"
    script.write_text(
        "import subprocess, sys\n"
        "from torchweft import Fabric\n"
        "fabric = Fabric(accelerator='cpu')\n"
        "fabric.launch()\n"
        "if fabric.global_rank == 1:\n"
        f"    subprocess.run([sys.executable, {str(SCRIPT)!r}, '{{}}'], check=True)\n"
        "fabric.barrier()\n"
    )
    result = run(*RUN, "--devices", "2", "--accelerator", "cpu", script)
    assert said(result) == [[0, 1, "single_device", "32-true", "inline", {}]]


def test_two_nodes_on_one_computer(start) -> None:
    """Two agents meet on one port, as on two computers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    common = [
        *RUN,
        "--devices",
        "1",
        "--num-nodes",
        "2",
        "--main-address",
        "127.0.0.1",
        "--main-port",
        str(port),
        "--strategy",
        "ddp",
        "--accelerator",
        "cpu",
    ]
    nodes = [start(*common, "--node-rank", str(n), SCRIPT, "{}") for n in (0, 1)]
    rows = [row for node in nodes for row in said(node.finish())]
    assert [row[:2] for row in rows] == [[0, 2], [1, 2]]


@pytest.mark.parametrize("preload", [[], ["--no-preload"]])
def test_a_script_without_a_fabric_is_told_so(preload: list[str], run, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text("print('a whole run')\n")
    result = run(*RUN, *preload, "--devices", "2", script)
    # Where nothing is buffered, print writes the end of a line by itself.
    assert (result.status, result.out.count("a whole run")) == (0, 2)
    assert result.err == (
        f"torchweft: {script} ended well, but none of its 2 processes made a Fabric: each ran the "
        "whole script by itself\n"
    )
