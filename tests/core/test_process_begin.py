from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.core.fresh_python import python

from torchweft import process
from torchweft.handoff import Handoff
from torchweft.rank import RankInfo


def test_a_rank_s_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "5"})
    info = RankInfo(rank=1, world_size=2, local_rank=1, local_world_size=2, run_id="run")
    handoff = Handoff(run_id="run", launcher="script", pid=os.getpid())
    process.become_rank(info, address="127.0.0.1", port=7, handoff=handoff, error_file="/e")
    assert RankInfo.from_environ(os.environ) == info
    assert Handoff.read(os.environ) == handoff
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert os.environ["MASTER_PORT"] == "7"
    assert os.environ[process.ERROR_FILE] == "/e"
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_what_was_handed_to_all_children_is_claimed_by_one() -> None:
    environ = Handoff(run_id="run", launcher="spawn", flags={"devices": 2}, parent=1).to_environ()
    assert Handoff.read(environ) is None
    process.claim(environ)
    assert Handoff.read(environ) == Handoff(
        run_id="run", launcher="spawn", flags={"devices": 2}, pid=os.getpid()
    )


SHARE = """
import os, sys
from torchweft import process
from torchweft.process.begin import usable_cores
if sys.argv[2] == "torch":
    import torch
    torch.set_num_threads(6)
    process.share_threads(int(sys.argv[1]))
    print(torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"))
else:
    process.share_threads(int(sys.argv[1]))
    print("torch" in sys.modules, os.environ.get("OMP_NUM_THREADS"), usable_cores())
"""


@pytest.mark.parametrize(
    ("ranks", "given", "expected"),
    [("3", None, "2 2"), ("1", None, "6 None"), ("9", None, "1 1"), ("3", "4", "6 4")],
)
def test_threads_with_torch(ranks: str, given: str | None, expected: str) -> None:
    assert python(SHARE, ranks, "torch", environ={"OMP_NUM_THREADS": given}).stdout == (
        f"{expected}\n"
    )


def test_threads_without_torch() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    done = python(SHARE, "2", "none", environ={"OMP_NUM_THREADS": None})
    assert done.stdout == f"False {max(1, (cores or 1) // 2)} {cores}\n"


# A grandchild outlives its parent by the time that it takes to notice.
ORPHAN = """
import os, signal, sys, time
from torchweft.process import begin
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    if sys.argv[1] == "kernel":
        begin.die_with_parent(os.getppid())
    else:
        import threading
        threading.Thread(target=begin._watch, args=(os.getppid(),), daemon=True).start()
    os.write(writer, b"watched")
    time.sleep(60)
    os._exit(0)
os.read(reader, 7)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["kernel", "thread"])
def test_a_process_dies_with_its_parent(how: str) -> None:
    if how == "kernel" and sys.platform != "linux":
        pytest.skip("only Linux's kernel does it")
    done = python(ORPHAN, how)  # returns when the orphan has let go of the pipes too
    assert done.returncode == -9
    assert not os.path.exists(f"/proc/{done.stdout.strip()}/fd/0")


def test_a_parent_that_died_before_is_noticed() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux's kernel does it")
    done = python("from torchweft import process; process.die_with_parent(0); print('alive')")
    assert (done.returncode, done.stdout) == (1, "")


STDIN = """
import os, sys
from torchweft import process
getattr(process, sys.argv[1])()
print(sys.stdin and [sys.stdin.read(), sys.stdin.fileno(), sys.stdin.encoding])
"""


def test_an_empty_standard_input() -> None:
    options = {"stdin": None, "input": "typed"}
    assert python(STDIN, "close_stdin", **options).stdout == "['', 0, 'utf-8']\n"


def test_standard_input_that_was_replaced() -> None:
    code = "import sys, os; sys.stdin = open(os.devnull)\n" + STDIN
    options = {"stdin": None, "input": "typed"}
    assert python(code, "open_stdin", **options).stdout == "['typed', 0, 'utf-8']\n"


@pytest.mark.parametrize(("what", "said"), [("open_stdin", "None"), ("close_stdin", "['', 0")])
def test_no_standard_input_at_all(what: str, said: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "{sys.executable}" -c "$0" {what} <&-', STDIN],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith(said)


def test_exit_handlers_of_the_parent_are_not_a_child_s() -> None:
    code = """
    import atexit, os, tempfile
    from torchweft import process
    before = tempfile.TemporaryDirectory()
    atexit.register(print, "the parent's")
    if os.fork() == 0:
        process.forget_exit_handlers()
        atexit.register(print, "the child's", flush=True)
        after = tempfile.TemporaryDirectory()
        atexit._run_exitfuncs()
        print(os.path.exists(before.name), os.path.exists(after.name), flush=True)
        os._exit(0)
    os.wait()
    """
    assert python(code).stdout == "the child's\nTrue False\nthe parent's\n"


def test_a_child_of_multiprocessing_as_if_started_by_hand() -> None:
    code = """
    import json, multiprocessing
    from torchweft import process
    def child(queue):
        process.as_main_process()
        queue.put([
            multiprocessing.get_start_method(allow_none=True),
            multiprocessing.current_process().name,
            multiprocessing.parent_process(),
        ])
        process.as_main_process("spawn")
        queue.put(multiprocessing.get_start_method())
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    context.Process(target=child, args=(queue,)).start()
    print(json.dumps([queue.get(), queue.get()]))
    """
    assert json.loads(python(code).stdout) == [[None, "MainProcess", None], "spawn"]


FLAGS = "from torchweft import process; print(*process.interpreter_flags())"


def test_options_of_the_interpreter_are_known() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-X", "dev", "-c"),
            "from torchweft import process; print(*process.interpreter_flags())",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "-Werror" in done.stdout
    assert "dev" in done.stdout
