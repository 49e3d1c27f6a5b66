"""Forking at ``launch()`` harms nobody: each script works, or ends in an error that says how."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HEAD = """
import os, random, sys, threading, tempfile
import torch
from torchweft import Fabric

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def start():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    return fabric
"""

AGAIN = "so instead of forking here, the command is run again for each of the 2 ranks"


@pytest.fixture
def script(tmp_path: Path):
    def write(body: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(HEAD + body)
        return path

    return write


def test_a_temporary_folder_around_it(run, script) -> None:
    path = script(
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    open(os.path.join(folder, 'made before'), 'w').close()\n"
        "    fabric = start()\n"
        "    say(fabric.global_rank, os.listdir(folder))\n"
        "    fabric.barrier()\n"
        "say('gone' if not os.path.exists(folder) else 'still there')\n"
    )
    result = run(sys.executable, path)
    assert result.status == 0, result.err
    assert result.err == ""
    assert sorted(result.lines) == ["0 ['made before']", "1 ['made before']", "gone", "gone"]


def test_random_streams_go_on(run, script) -> None:
    path = script(
        "import numpy\n"
        "random.seed(5); numpy.random.seed(5); torch.manual_seed(5)\n"
        "random.random(); numpy.random.rand(); torch.rand(1)\n"
        "start()\n"
        "say(random.random(), numpy.random.rand(), torch.rand(1).item())\n"
    )
    alone = (
        "import random, numpy, torch\n"
        "random.seed(5); numpy.random.seed(5); torch.manual_seed(5)\n"
        "random.random(); numpy.random.rand(); torch.rand(1)\n"
        "print(random.random(), numpy.random.rand(), torch.rand(1).item())\n"
    )
    expected = run(sys.executable, "-c", alone).lines
    result = run(sys.executable, path)
    assert result.status == 0, result.err
    assert result.lines == expected * 2


def test_unflushed_output_is_printed_once(run, script) -> None:
    path = script("print('before')\nfabric = start()\nprint('after')\n")
    result = run(sys.executable, path, environ={"PYTHONUNBUFFERED": ""})
    assert result.status == 0, result.err
    assert sorted(result.lines) == ["after", "after", "before"]


def test_code_above_runs_once(run, script) -> None:
    path = script("say('above')\nstart()\nsay('below')\n")
    result = run(sys.executable, path)
    assert result.status == 0, result.err
    assert sorted(result.lines) == ["above", "below", "below"]
    assert result.err == ""


def test_a_used_openmp_pool(run, script) -> None:
    """Its children would hang in their first parallel operation, so nothing is forked."""
    path = script(
        "torch.set_num_threads(2)\n"
        "torch.randn(600, 600) @ torch.randn(600, 600)\n"
        "torch.randn(1 << 20).sin().sum()\n"
        "fabric = start()\n"
        "torch.set_num_threads(2)\n"
        "torch.randn(1 << 20).sin().sum()\n"
        "say(fabric.global_rank)\n"
    )
    result = run(sys.executable, path)
    assert result.status == 0, result.err
    assert sorted(result.lines) == ["0", "1"]
    assert "thread(s) of a library, such as the OpenMP pool" in result.err
    assert AGAIN in result.err


def test_another_thread(run, script) -> None:
    path = script(
        "threading.Thread(target=threading.Event().wait, name='watcher', daemon=True).start()\n"
        "fabric = start()\n"
        "say(fabric.global_rank)\n"
    )
    result = run(sys.executable, path)
    assert result.status == 0, result.err
    assert sorted(result.lines) == ["0", "1"]
    assert "this process has other threads (watcher)" in result.err
    assert AGAIN in result.err


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_script_that_went_elsewhere(how: str, run, script, tmp_path: Path) -> None:
    """It runs again from where it was started, and goes there again."""
    path = script(
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "os.makedirs('out', exist_ok=True)\n"
        "os.chdir('out')\n"
        "fabric = start()\n"
        "say(fabric.global_rank, os.getcwd(), sys.argv[1:])\n"
    )
    named = [path.name] if how == "script" else ["-m", path.stem]
    result = run(sys.executable, *named, "script.py", cwd=tmp_path)
    assert result.status == 0, result.err
    assert sorted(result.lines) == [f"{rank} {tmp_path}/out ['script.py']" for rank in (0, 1)]
    assert AGAIN in result.err


def test_a_fork_server_of_multiprocessing(run, script) -> None:
    """One that the script has used is its own; ranks start others."""
    path = script(
        "import multiprocessing\n"
        "def double(number):\n"
        "    return 2 * number\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('forkserver')\n"
        "    def doubled(number):\n"
        "        with context.Pool(1) as pool:\n"
        "            done = pool.apply(double, [number])\n"
        "            pool.close()\n"
        "            pool.join()\n"
        "        return done\n"
        "    doubled(1)\n"
        "    fabric = start()\n"
        "    say(fabric.global_rank, doubled(fabric.global_rank))\n"
    )
    result = run(sys.executable, path)
    assert (result.status, result.err) == (0, "")
    assert sorted(result.lines) == ["0 0", "1 2"]


def test_a_tracer(run, script) -> None:
    path = script(
        "def trace(frame, event, argument):\n    return None\n"
        "sys.settrace(trace)\n"
        "fabric = start()\n"
        "say(fabric.global_rank)\n"
    )
    result = run(sys.executable, path)
    assert result.status == 0, result.err
    assert sorted(result.lines) == ["0", "1"]
    assert "a tracer is active" in result.err
    assert AGAIN in result.err


def test_a_debugger(run, script) -> None:
    path = script("start()\nsay('unreachable')\n")
    result = run(sys.executable, "-m", "pdb", "-c", "continue", path, text="q\n")
    assert "unreachable" not in result.out
    shown = result.out + result.err
    assert "fabric.launch() cannot make 2 processes under the debugger pdb" in shown
    assert "torchweft run --devices 2" in shown
    assert "fabric.launch(function)" in shown


def test_python_c(run, script) -> None:
    code = HEAD + "fabric = start()\nsay(fabric.global_rank)\n"
    result = run(sys.executable, "-c", code)
    assert result.status == 0, result.err
    assert sorted(result.lines) == ["0", "1"]


def test_python_c_that_cannot_be_forked(run) -> None:
    code = HEAD + (
        "threading.Thread(target=threading.Event().wait, name='watcher', daemon=True).start()\n"
        "start()\n"
    )
    result = run(sys.executable, "-c", code)
    assert result.status == 1
    assert "because its program was given with python -c" in result.err
    assert "fabric.launch(function)" in result.err
    assert "torchweft run --devices 2 train.py" in result.err


def test_a_program_on_stdin(run) -> None:
    code = HEAD + "fabric = start()\nsay(fabric.global_rank)\n"
    result = run(sys.executable, "-", text=code)
    assert result.status == 0, result.err
    assert sorted(result.lines) == ["0", "1"]


def test_a_program_on_stdin_that_cannot_be_forked(run) -> None:
    code = HEAD + (
        "threading.Thread(target=threading.Event().wait, name='watcher', daemon=True).start()\n"
        "start()\n"
    )
    result = run(sys.executable, "-", text=code)
    assert result.status == 1
    assert "because its program came from standard input" in result.err


@pytest.mark.parametrize("again", [False, True], ids=["forked", "run again"])
def test_a_pipe_on_stdin(again: bool, run, script) -> None:
    thread = (
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n" if again else ""
    )
    path = script(thread + "fabric = start()\nsay(fabric.global_rank, repr(sys.stdin.read()))\n")
    result = run(sys.executable, path, text="data\n")
    assert result.status == 0, result.err
    assert sorted(result.lines) == [r"0 'data\n'", "1 ''"]


def test_under_pytest(run, tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(HEAD + "def test_it():\n    start()\n")
    result = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test)
    assert result.status == 1
    assert "pytest would run on in every rank" in result.out
    assert "because it runs under pytest" in result.out
    assert "fabric.launch(function)" in result.out


def test_function_under_pytest(run, tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(
        HEAD
        + "def train(fabric):\n    return fabric.world_size\n"
        + "def test_it():\n"
        + "    fabric = Fabric(accelerator='cpu', devices=2, strategy='ddp')\n"
        + "    assert fabric.launch(train) == 2\n"
    )
    result = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test)
    assert result.status == 0, result.out


def test_finally_and_atexit_run_in_ranks_alone(run, script) -> None:
    path = script(
        "import atexit\n"
        "atexit.register(lambda: say('atexit', os.environ.get('RANK')))\n"
        "try:\n    start()\nfinally:\n    say('finally', os.environ.get('RANK'))\n"
    )
    result = run(sys.executable, path)
    assert result.status == 0, result.err
    assert sorted(result.lines) == ["atexit 0", "atexit 1", "finally 0", "finally 1"]


def test_exit_status_of_the_script(run, script) -> None:
    result = run(sys.executable, script("start()\nsys.exit(7)\n"))
    assert result.status == 7


def test_interactive_session(run) -> None:
    code = (
        "from torchweft import Fabric\n"
        "Fabric(accelerator='cpu', devices=2, strategy='ddp').launch()\n"
    )
    result = run(sys.executable, "-i", "-q", text=code)
    assert "because it is an interactive session" in result.err
    assert "fabric.launch(function)" in result.err
