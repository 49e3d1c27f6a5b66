from __future__ import annotations

import signal
import threading

import pytest
from tests.core.fresh_python import python

from torchweft import process


def test_a_signal_waits_while_processes_are_made() -> None:
    code = """
    import os, signal
    from torchweft import process
    signal.signal(signal.SIGTERM, lambda number, frame: print("told", number))
    with process.held_back():
        os.kill(os.getpid(), signal.SIGTERM)
        print("made")
    print("done")
    """
    assert python(code).stdout == "made\ntold 15\ndone\n"


def test_what_was_held_back_before_stays_so() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        with process.held_back():
            pass
        assert signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_an_ignored_signal_is_not_minded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in process.respected()
        assert signal.SIGTERM in process.respected()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_main_thread_is_known() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(process.in_main_thread()))
    thread.start()
    thread.join()
    assert found == [False]
    assert process.in_main_thread()


PATIENCE = """
import os, pty, sys
from torchweft import process
if sys.argv[1] == "terminal":
    pid, terminal = pty.fork()
    if pid:
        print(os.read(terminal, 100).decode().strip())
        sys.exit()
    if sys.argv[2] == "behind":
        # The session's leader stays before; its child is a job in the background.
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
        os.setpgid(0, 0)
else:
    os.setsid()
print(process.interrupt_patience(), flush=True)
"""


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (("terminal", "before"), process.LONG_GRACE),
        (("terminal", "behind"), process.GRACE),
        (("nowhere", ""), process.GRACE),
    ],
)
def test_who_sits_at_a_terminal_can_interrupt_again(
    where: tuple[str, str], expected: float
) -> None:
    done = python(PATIENCE, *where)
    assert done.stdout.strip() == str(expected), done.stderr


@pytest.mark.parametrize("number", process.ENDING)
def test_a_command_ends_in_python_s_way(number: int) -> None:
    code = """
    import atexit, os, sys
    from torchweft import process
    atexit.register(print, "tidied up")
    process.exit_on_signals()
    os.kill(os.getpid(), int(sys.argv[1]))
    """
    done = python(code, str(int(number)))
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "tidied up\n", "")
