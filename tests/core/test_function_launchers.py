"""``fabric.launch(function)`` on real processes; one caller does many launches in a row."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tests.core.fresh_python import python

HEAD = '''
import contextlib, os, random, signal, sys, tempfile, threading, time, types
import torch
from torchweft import Fabric, hookimpl
from torchweft.errors import Misuse, RankFailed, TorchweftError

def fabric(launcher):
    return Fabric(accelerator="cpu", devices=2, strategy="ddp", launcher=launcher)

def check(condition, *what):
    if not condition:
        raise AssertionError(what)

def who(fabric):
    """What the ranks have in common, and what rank 0 returns."""
    total = int(fabric.all_reduce(fabric.global_rank + 1, reduce_op="sum"))
    return fabric.global_rank, total, os.environ["RANK"], fabric.world_size

def large(fabric):
    return {"values": torch.arange(25_000_000, dtype=torch.float32), "rank": fabric.global_rank}

def small(fabric):
    model = fabric.setup(torch.nn.Linear(3, 2))
    loss = model(torch.ones(4, 3)).sum()
    return {"loss": loss, "view": torch.zeros(1000)[:2], "state": model.state_dict()}

def generator(fabric):
    return (value for value in range(3))

def leave(fabric, status):
    sys.exit(status)

def failing(fabric):
    if fabric.global_rank == 1:
        raise ValueError("rank one has had enough")
    fabric.barrier()

def die_while_sending(fabric):
    if fabric.global_rank == 0:
        # A helper that outlives this rank holds everything open that it had.
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return Endless()
    time.sleep(1)

class Endless:
    def __reduce__(self):
        return bytes, (b"x" * 300_000_000,)

def nested(fabric):
    """A second Fabric in a rank is in the same run."""
    other = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    other.launch()
    inner = other.launch(who)
    return other.global_rank, other.world_size, inner, int(other.all_reduce(1, reduce_op="sum"))

def streams(fabric):
    return random.random(), torch.rand(1).item()

def tidy(fabric, path):
    """Files of a rank go with it."""
    global kept
    kept = tempfile.TemporaryDirectory(dir=path)
    return os.path.exists(kept.name)
'''

COMMON = """
def every_launcher(launcher, folder):
    before = dict(os.environ)
    check(fabric(launcher).launch(who) == (0, 3, "0", 2))
    one = fabric(launcher)
    check([one.launch(who), one.launch(who)] == [(0, 3, "0", 2)] * 2)
    random.seed(3)
    torch.manual_seed(3)
    back = fabric(launcher).launch(streams)
    check(back == (random.random(), torch.rand(1).item()), "random streams")
    check(fabric(launcher).launch(tidy, folder) and os.listdir(folder) == [], "a rank's files")
    back = fabric(launcher).launch(large)
    check(torch.equal(back["values"], torch.arange(25_000_000, dtype=torch.float32)), "100 MB")
    changed = {name for name in {*os.environ, *before} if os.environ.get(name) != before.get(name)}
    check(changed <= {"TORCHINDUCTOR_CACHE_DIR"}, changed)  # which torch sets when it is imported
    print("done")
"""

FORKED = """
def fork_alone(folder):
    back = fabric("fork").launch(small)
    check(not back["loss"].requires_grad and back["view"].tolist() == [0, 0])
    check(back["view"].untyped_storage().nbytes() == 8, "a view")
    check(sorted(back["state"]) == ["bias", "weight"])
    check(fabric("fork").launch(lambda fabric: fabric.global_rank) == 0)  # nothing is pickled
    check(fabric("fork").launch(nested) == (0, 2, (0, 3, "0", 2), 2), "nested")
    check(fabric("fork").launch(leave, 0) is None)

    def raised(function, *args):
        try:
            fabric("fork").launch(function, *args)
        except (TorchweftError, KeyboardInterrupt) as error:
            return error

    error = raised(generator)
    check("returned a builtins.generator in rank 0, which cannot be pickled" in str(error), error)
    error = raised(failing)
    check("rank 1 of 2 failed: ValueError: rank one has had enough" in str(error), error)
    error = raised(leave, 3)
    check("of 2 failed: ended with exit status 3" in str(error) and error.exit_status == 3, error)

    # What plugins see of either.
    saw = os.path.join(folder, "saw")
    @contextlib.contextmanager
    def torchweft_worker_context(run):
        try:
            yield
        except SystemExit as end:
            open(saw, "w").close()
            raise
    hooks = types.ModuleType("hooks")
    hooks.torchweft_worker_context = hookimpl(torchweft_worker_context)
    watched = Fabric(accelerator="cpu", devices=2, strategy="ddp", launcher="fork", plugins=[hooks])
    check(watched.launch(leave, 0) is None and not os.path.exists(saw), "an end without a failure")
    try:
        watched.launch(leave, 3)
    except RankFailed:
        os.remove(saw)
    error = raised(die_while_sending)
    check("rank 0 of 2 failed: killed by signal 9" in str(error), error)

    # Elsewhere than in the main thread, which goes on meanwhile.
    found = []
    thread = threading.Thread(target=lambda: found.append(fabric("fork").launch(who)))
    thread.start()
    thread.join()
    check(found == [(0, 3, "0", 2)], "a thread")

    # An interrupt for this process ends the ranks and is raised here, as everywhere.
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
    error = raised(lambda fabric: time.sleep(600))
    check(isinstance(error, KeyboardInterrupt), error)
    # One that the program takes is the program's.
    signal.signal(signal.SIGTERM, lambda *_: found.append("mine"))
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGTERM)).start()
    error = raised(lambda fabric: (signal.signal(15, signal.SIG_DFL), time.sleep(600)))
    check("the ranks were ended by SIGTERM" in str(error) and found[-1] == "mine", error)
    try:
        os.wait()
        check(False, "children are left")
    except ChildProcessError:
        print("nobody left")
"""

MAIN = """
if __name__ == "__main__":
    launcher, folder = sys.argv[1:3]
    tempfile.tempdir = sys.argv[3]
    if launcher == "fork":
        fork_alone(folder)
    every_launcher(launcher, folder)  # starts the OpenMP pool, and nothing is forked after it
    # The first is there until this process ends, the second is torch's.
    known = ("pymp", "torchinductor")
    if [int(part) for part in torch.__version__.split(".")[:2]] < [2, 10]:
        known += ("tmp",)  # of torch's too
    left = [name for name in os.listdir(sys.argv[3]) if not name.startswith(known)]
    print(left)
"""


@pytest.mark.parametrize("launcher", ["fork", "spawn", "forkserver"])
def test_launches_in_a_row(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    script = tmp_path / "script.py"
    script.write_text(HEAD + COMMON + FORKED + MAIN)
    # A short name: multiprocessing's server has a socket in it, whose path may have 108 bytes.
    with tempfile.TemporaryDirectory(prefix="tw-") as temporary:
        done = subprocess.run(
            [sys.executable, script, launcher, tmp_path / "ranks", temporary],
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    expected = [*(["nobody left"] if launcher == "fork" else []), "done", "[]"]
    assert without_gloo(done.stdout) == expected
    # torchweft says nothing of what ends well, and nothing of what it raises.
    assert done.stderr == ""


def without_gloo(printed: str) -> list[str]:
    """The lines that are not gloo's: that of some versions tells of every rank, on stdout.

    Ranks that write at once get into each other's lines, of which digits may be left.
    """
    lines = printed.splitlines()
    return [each for each in lines if "peer ranks" not in each and each.strip("0123456789 ")]


NOTEBOOK = """
import threading
import torch
from torchweft import Fabric
for name in ("IOPub", "Heartbeat", "Control"):
    threading.Thread(target=threading.Event().wait, name=name, daemon=True).start()

def train(fabric):
    return fabric.global_rank, fabric.world_size

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch(train)
1 / 0
fabric.launch(lambda fabric: "after an error: " + str(fabric.all_gather(1).tolist()))
Fabric(accelerator="cpu", devices=2, strategy="ddp_notebook").launch(train)
_ = torch.set_num_threads(2), torch.randn(1 << 20).sin().sum()
fabric.launch(train)
fabric.launch()
"""


def test_an_interactive_session_with_threads() -> None:
    """As a notebook is: functions are forked, also after an error, and threads are no matter."""
    done = subprocess.run(
        [sys.executable, "-i", "-q"],
        input=NOTEBOOK,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0
    expected = ["(0, 2)", "'after an error: [1, 1]'", "(0, 2)"]
    assert without_gloo(done.stdout) == expected, done.stderr
    # After work that nothing can be forked after, what was typed here cannot be handed over.
    assert (
        "torchweft.errors.Misuse: fresh processes cannot be given 'train', which was defined in a "
        "program that they cannot import (an interactive session, python -c, or standard input); "
        "define it in a module, or call fabric.launch(function) before this: this process has "
    ) in done.stderr
    assert "because it is an interactive session; pass the training function" in done.stderr


def test_a_function_is_required() -> None:
    code = (
        "from torchweft import Fabric\n"
        "Fabric(accelerator='cpu', devices=2, strategy='ddp', launcher='spawn').launch()\n"
    )
    done = python(code)
    assert done.stderr.endswith(
        "torchweft.errors.Misuse: launcher 'spawn' calls a function in every process, and "
        "fabric.launch() was called without one; pass the training function: "
        "fabric.launch(function)\n"
    )


def test_what_a_fork_would_not_survive_is_refused() -> None:
    code = (
        "import torch\n"
        "from torchweft import Fabric\n"
        "torch.set_num_threads(2); torch.randn(1 << 20).sin().sum()\n"
        "Fabric(accelerator='cpu', devices=2, strategy='ddp', launcher='fork').launch(print)\n"
    )
    told = python(code).stderr.splitlines()[-1]
    assert told.startswith(
        "torchweft.errors.Misuse: launcher 'fork' cannot be used in this process: this process has "
    )
    assert told.endswith(
        "call fabric.launch(function) before such work, or use launcher='spawn' with a function "
        "that can be imported"
    )


UNGUARDED = """
import sys
from torchweft import Fabric
def train(fabric):
    pass
Fabric(accelerator="cpu", devices=2, strategy="ddp", launcher="spawn").launch(train)
"""


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """Each fresh process would launch it all again."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 1
    assert (
        "torchweft.errors.Misuse: fabric.launch() was reached while a process that was just "
        "started, a rank or a worker of a DataLoader, imports the script; call it below if "
        "__name__ == '__main__':"
    ) in done.stderr
