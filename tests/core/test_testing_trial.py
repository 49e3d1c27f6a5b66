from __future__ import annotations

import os
import pickle
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from torchweft.specs import Availability
from torchweft.testing import trial
from torchweft.testing.interpreter import fresh_interpreter
from torchweft.testing.trial import Report, Tried

HOOKS = """
from torchweft.hookspecs import hookimpl
from torchweft.specs import PrecisionSpec

@hookimpl
def torchweft_precisions():
    return [PrecisionSpec(name="mine", target="my_hooks:Mine", probe="my_hooks:probe")]

def probe():
    import numpy
    from torchweft.specs import Availability
    return Availability(ok=True, count=3)

def ends():
    import os
    os._exit(3)

def detect(environ):
    return environ
"""


def no_devices() -> set[str]:
    return set()


def test_a_trial_of_hooks_a_probe_and_a_detection(tmp_path: Path) -> None:
    (tmp_path / "my_hooks.py").write_text(HOOKS)
    path = tmp_path / "report"
    found = {"name": "mine", "distribution": "torchweft-mine", "version": "1"}
    probes, detections = ["my_hooks:probe", "my_hooks:ends", "my_hooks:absent"], ["my_hooks:detect"]
    done = fresh_interpreter(
        "from torchweft.testing.trial import without_torch\n"
        f"without_torch({str(path)!r}, {found!r}, 'my_hooks', {probes!r}, {detections!r})",
        environ={"PYTHONPATH": str(tmp_path)},
    )
    assert done.status == 0, done.err
    assert done.loaded.isdisjoint({"torch", "numpy"})  # numpy was a child's
    report: Report = pickle.loads(path.read_bytes())
    assert (report.hooks.error, report.hooks.imported) == ("", {})
    assert "PrecisionSpec(name='mine'" in report.specs
    probe, ends, absent, detect = (report.targets[name] for name in (*probes, *detections))
    assert probe.availability == Availability(ok=True, count=3)
    assert list(probe.imported) == ["numpy"]
    assert probe.imported["numpy"].endswith("my_hooks.py, line 10")
    assert ends.error == "it ended the interpreter (status 3)"
    assert "has no attribute 'absent'" in absent.error
    assert detect.answer == "{}"


def test_a_device_that_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every computer has this one, which else is harmless.
    monkeypatch.setattr(trial, "_HARMLESS", ("/dev/pts/", "/dev/tty", "/dev/zero"))
    opened = []

    def step() -> None:
        opened.append(os.open("/dev/full", os.O_RDONLY))
        opened.append(os.open("/dev/zero", os.O_RDONLY))

    tried = trial._step(step, trial._open_devices)
    again = trial._step(lambda: None, trial._open_devices)
    for descriptor in opened:
        os.close(descriptor)
    if sys.platform == "linux":
        assert tried.touched == ("/dev/full is open",)
    assert again.touched == ()


def test_a_step_that_fails_has_the_traceback_of_the_plugin_alone() -> None:
    def step() -> None:
        raise SystemExit("gave up")

    tried = trial._step(step, no_devices)
    assert tried.error == "SystemExit: gave up"
    assert tried.trace.startswith("Traceback (most recent call last):\n")
    assert f'File "{__file__}", line' in tried.trace.splitlines()[1]


def test_what_python_does_is_heard_only_while_it_is_listened_to(tmp_path: Path) -> None:
    code = f"""
    import os, socket, subprocess, sys, threading
    sys.path.insert(0, {str(tmp_path)!r})
    from torchweft.testing import trial
    audit = trial._Audit()
    trial._devices = set
    open(os.devnull).close()
    for name in ("Quiet", "Loud", "Late"):
        print(trial._construct("mine:" + name, audit).did)
    """
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import os, socket, threading

            class Quiet:
                def __init__(self):
                    import colorsys  # reads a file, once
                    os.environ.get("HOME"), socket.socket().close()

            class Loud:
                def __init__(self):
                    open(os.devnull).close()
                    os.listdir(".")
                    socket.getaddrinfo("127.0.0.1", 1)
                    os.environ["MINE"] = "1"

            class Late:
                def __init__(self):
                    threading.Thread(target=threading.Event().wait, daemon=True).start()
            """
        )
    )
    done = fresh_interpreter(code)
    loud = ("open('/dev/null')", "os.listdir('.')", "socket.getaddrinfo('127.0.0.1')")
    assert done.out.splitlines() == [
        "()",
        str((*loud, "os.putenv(b'MINE')")),
        "('it started a thread',)",
    ], done.err


def test_answers_of_hooks() -> None:
    assert trial._wrong_sentences(["no"]) == trial._wrong_sentences(()) == ""
    assert trial._wrong_sentences("no") == "returned 'no', and not a list of sentences"
    assert trial._wrong_sentences(7) == "returned 7, and not a list of sentences"
    assert trial._wrong_sentences(["no", " "]) == "returned ' ' among its sentences"
    assert trial._wrong_sentences([3]) == "returned 3 among its sentences"
    assert trial._wrong_context(threading.Lock()) == ""
    assert trial._wrong_context(None) == "returned None, and not a context manager"


def test_a_report_can_be_handed_over() -> None:
    report = Report(hooks=Tried(error="no"), answers={"a": ""})
    assert pickle.loads(pickle.dumps(report)) == report
