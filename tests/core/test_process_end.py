from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.core.fresh_python import python

from torchweft.process import ERROR_FILE, exit_status

HEAD = """
import atexit, ctypes, os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from torchweft import process
from torchweft.errors import Misuse
"""


def run(code: str, *arguments: object, error_file: Path | None = None):  # type: ignore[no-untyped-def]
    environ = {ERROR_FILE: str(error_file) if error_file else None, "PYTHONUNBUFFERED": None}
    return python(HEAD + code, *map(str, arguments), environ=environ)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SystemExit(), 0),
        (SystemExit(None), 0),
        (SystemExit(3), 3),
        (SystemExit(-1), 255),
        (SystemExit(256), 0),
        (SystemExit(True), 1),
        (KeyboardInterrupt(), 130),
        (ValueError(), 1),
        (GeneratorExit(), 1),
    ],
)
def test_status(error: BaseException, status: int) -> None:
    assert exit_status(error) == status


def test_words_of_an_exit_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(SystemExit("what was wrong")) == 1
    assert capsys.readouterr().err == "what was wrong\n"


ORDER = """
def late():
    time.sleep(0.2)
    print("thread")
    threading.Thread(target=print, args=("thread of a thread",)).start()
executor = ThreadPoolExecutor(1)
executor.submit(int).result()
atexit.register(print, "registered first")
atexit.register(print, "registered second")
threading.Thread(target=late).start()
threading.Thread(target=threading.Event().wait, daemon=True).start()
process.end(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 4])
def test_the_order_of_an_end(status: int) -> None:
    """That of the interpreter, which waits for pools of threads only after it told them to end."""
    done = run(ORDER, status)
    assert done.returncode == status, done.stderr
    expected = ["thread", "thread of a thread", "registered second", "registered first"]
    assert done.stdout.splitlines() == expected
    assert done.stderr == ""


def test_a_thread_that_never_ends_does_not_hold_up_a_failure() -> None:
    code = (
        "threading.Thread(target=threading.Event().wait).start()\n"
        "atexit.register(print, 'tidied up')\n"
        "process.end(1)\n"
    )
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (1, "tidied up\n", "")


def test_an_exit_handler_that_fails_is_python_s_to_tell() -> None:
    done = run("atexit.register(lambda: 1 / 0)\natexit.register(print, 'other')\nprocess.end(0)\n")
    assert (done.returncode, done.stdout) == (0, "other\n")
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("end", ["sys.exit(3)", "print('the end')", "sys.exit('words')"])
def test_an_owned_interpreter_ends_as_python_does(end: str) -> None:
    """With the same status, and what C libraries hold in memory is written."""
    code = (
        "class Deadly:\n"
        "    def __del__(self):\n"
        "        os._exit(99)\n"
        "kept = Deadly()\n"
        "process.own_the_end()\n"
        "process.stay_until_the_end(lambda failed: print('left', failed), keep=True)\n"
        "ctypes.CDLL(None).printf(b'library\\n')\n"
    )
    done = run(code + end)
    expected = {"sys.exit(3)": 3, "sys.exit('words')": 1}.get(end, 0)
    assert done.returncode == expected, done.stderr
    assert {"left False", "library"} <= set(done.stdout.splitlines())


def test_an_error_of_an_owned_interpreter_is_recorded(tmp_path: Path) -> None:
    code = (
        "process.own_the_end()\n"
        "process.stay_until_the_end(lambda failed: print('left', failed), keep=True)\n"
        "raise ValueError('no')\n"
    )
    done = run(code, error_file=tmp_path / "error.json")
    assert (done.returncode, done.stdout, done.stderr) == (1, "left True\n", "")
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == "ValueError: no"


def test_an_interrupt_is_no_error(tmp_path: Path) -> None:
    code = "process.own_the_end()\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    done = run(code, error_file=tmp_path / "error.json")
    assert (done.returncode, done.stderr) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_a_hook_that_the_script_sets_later_is_the_script_s(tmp_path: Path) -> None:
    code = (
        "process.own_the_end()\n"
        "process.stay_until_the_end(lambda failed: print('left', failed), keep=True)\n"
        "sys.excepthook = lambda kind, error, trace: print('mine:', error)\n"
        "raise ValueError('no')\n"
    )
    done = run(code, error_file=tmp_path / "error.json")
    assert (done.returncode, done.stdout) == (1, "mine: no\nleft True\n")


@pytest.mark.parametrize("later", [False, True])
def test_an_error_that_was_shown_before_is_none_of_this_run(later: bool) -> None:
    """As in an interactive session, which goes on after an error."""
    code = (
        "sys.last_value = ValueError('an older one')\n"
        "process.stay_until_the_end(lambda failed: print('left', failed), keep=False)\n"
    )
    done = run(code + ("sys.last_value = KeyError('of this run')\n" if later else ""))
    assert (done.returncode, done.stdout) == (0, f"left {later}\n")


FAILING = (
    "def leave(failed):\n"
    "    print('written')\n"
    "    raise OSError('the network is gone')\n"
    "process.stay_until_the_end(leave, keep=True)\n"
)


def test_leaving_that_fails_fails_the_rank(tmp_path: Path) -> None:
    done = run(FAILING, error_file=tmp_path / "error.json")
    assert (done.returncode, done.stdout, done.stderr) == (1, "written\n", "")
    message = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert message == "OSError: the network is gone"


def test_leaving_that_fails_where_nobody_else_tells_it() -> None:
    done = run(FAILING)
    assert done.stdout == "written\n"
    assert "OSError: the network is gone" in done.stderr


def test_destructors_run_where_there_was_no_group() -> None:
    code = (
        "class Kept:\n"
        "    def __del__(self):\n"
        "        os.write(1, b'destroyed')\n"
        "kept = Kept()\n"
        "process.stay_until_the_end(lambda failed: None, keep=False)\n"
    )
    assert run(code).stdout == "destroyed"


def test_a_rank_that_failed_waits_for_nobody_where_nobody_is() -> None:
    code = (
        "began = time.monotonic()\n"
        "process.wind_down(1)\n"
        "print(time.monotonic() - began, flush=True)\n"
        "os._exit(1)\n"
    )
    assert float(run(code).stdout) < 1
