"""Ranks that somebody outside ends once one has failed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from tests.core.fresh_python import python

HEAD = """
import os, sys, threading, time
from torchweft import process
from torchweft.process import outside
outside._PATIENCE = 0.3
process.stay_until_the_end(lambda failed: print('left', failed), keep=False)
process.end_with_the_others(1, 4)
"""
LOST = "raise RuntimeError('Connection closed by peer [192.0.2.1]')\n"


def test_a_failure_is_told_as_python_does() -> None:
    done = python(HEAD + "raise ValueError('no')\n")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("ValueError: no\n")
    assert done.stdout == "left True\n"


def test_a_thread_that_never_ends_holds_nobody_up() -> None:
    begun = time.monotonic()
    impatient = "sys.modules['torchweft.process.end']._PATIENCE = 0.1\n"
    thread = "threading.Thread(target=threading.Event().wait).start()\n"
    done = python(HEAD + impatient + thread + "raise KeyError\n")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "KeyError")
    assert time.monotonic() - begun < 20


def test_who_lost_a_peer_waits_in_silence_to_be_ended() -> None:
    code = HEAD.replace("0.3", "60") + "print('now', flush=True)\n" + LOST
    started = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with started:
        assert started.stdout is not None
        assert started.stdout.readline() == "now\n"
        started.send_signal(signal.SIGTERM)
        out, err = started.communicate(timeout=60)
    assert (started.returncode, out, err) == (-signal.SIGTERM, "", "")


def test_who_lost_a_peer_and_is_not_ended_says_so_in_a_line() -> None:
    done = python(HEAD + LOST.replace("192.0.2.1]", "192.0.2.1]. " + "Advice. " * 40))
    assert done.stderr.startswith(
        "torchweft: rank 1 of 4 ends because it lost another rank, which says why it failed, or "
        "left out a collective operation (RuntimeError: Connection closed by peer [192.0.2.1]. Adv"
    )
    assert done.stderr.endswith(" …); TORCHWEFT_TRACE=1 shows where\n")
    assert len(done.stderr.splitlines()) == 1
    assert (done.returncode, done.stdout) == (1, "left True\n")


def test_its_traceback_is_there_for_who_asks() -> None:
    done = python(HEAD + LOST, environ={"TORCHWEFT_TRACE": "1"})
    assert done.stderr.splitlines()[-1] == "RuntimeError: Connection closed by peer [192.0.2.1]"
    assert "lost another rank" not in done.stderr


def test_a_refused_connection_of_the_scripts_own_is_a_failure() -> None:
    done = python(HEAD + "raise ConnectionRefusedError(111, 'Connection refused')\n")
    assert done.stderr.startswith("Traceback (most recent call last):\n")


def test_being_asked_twice_changes_nothing() -> None:
    done = python(HEAD + "process.end_with_the_others(1, 4)\nraise ValueError('no')\n")
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 1)


def test_the_hook_of_the_script_is_called() -> None:
    mine = "sys.excepthook = lambda kind, error, trace: print('mine:', error)\n"
    head = HEAD.replace("process.end_with", mine + "process.end_with")
    done = python(head + "raise ValueError('no')\n")
    assert (done.returncode, done.stdout) == (1, "mine: no\nleft True\n")


def test_an_interrupt_ends_as_in_python() -> None:
    done = python(HEAD + "import signal\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    assert done.returncode == -signal.SIGINT
    assert done.stderr.endswith("KeyboardInterrupt\n")


def test_an_exit_is_none() -> None:
    done = python(HEAD + "sys.exit(3)\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "left False\n", "")
