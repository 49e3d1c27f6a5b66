from __future__ import annotations

import os
import signal
import sys
import venv
from pathlib import Path

import pytest

from torchweft.testing import Interpreted
from torchweft.testing.interpreter import fresh_interpreter


def test_what_it_printed_and_how_it_ended() -> None:
    done = fresh_interpreter(
        """
        import sys
        print("said")
        print("complained", file=sys.stderr)
        sys.exit(3)
        """
    )
    assert (done.status, done.out, done.err) == (3, "said\n", "complained\n")
    assert isinstance(done, Interpreted)


def test_an_error_has_its_traceback() -> None:
    done = fresh_interpreter("x = 1\nraise ValueError('no')")
    assert done.status == 1
    assert 'File "<fresh>", line 2, in <module>' in done.err
    assert done.err.endswith("ValueError: no\n")


def test_the_module_is_an_empty_one_of_the_name_main() -> None:
    code = "print(__name__, sorted(name for name in globals() if not name.startswith('__')))"
    assert fresh_interpreter(code).out == "__main__ []\n"


def test_what_was_imported_at_the_end() -> None:
    done = fresh_interpreter("import atexit\natexit.register(lambda: __import__('colorsys'))")
    assert "colorsys" in done.loaded  # even by what runs at the very end
    assert done.loaded.isdisjoint({"torch", "numpy", "pytest", "torchweft", "sndhdr"})
    assert "torch" in fresh_interpreter("import torch").loaded


def test_a_child_does_not_tell_for_its_parent() -> None:
    done = fresh_interpreter(
        """
        import os, sys
        if os.fork() == 0:
            import colorsys
            sys.exit()
        os.wait()
        import wave
        """
    )
    assert "wave" in done.loaded
    assert "colorsys" not in done.loaded


@pytest.mark.parametrize("end", ["os._exit(4)", "os.kill(os.getpid(), 9)"])
def test_an_interpreter_that_did_not_end_by_itself_tells_no_imports(end: str) -> None:
    done = fresh_interpreter(f"import os\nprint('before')\n{end}")
    assert done.status == (4 if "4" in end else -9)
    assert (done.out, done.loaded) == ("before\n", frozenset())


def test_it_finds_what_this_session_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that pytest's ``pythonpath`` or a conftest alone put on the path."""
    (tmp_path / "only_here.py").write_text("where = 'here'")
    code = "import sys, only_here\nprint(only_here.where, sys.path)"
    assert "ModuleNotFoundError: No module named 'only_here'" in fresh_interpreter(code).err
    monkeypatch.syspath_prepend(tmp_path)
    assert fresh_interpreter(code).out == f"here {sys.path}\n"


def test_a_path_that_the_caller_names_comes_first(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "colorsys.py").write_text(f"print({folder.name!r})")
    path = os.pathsep.join(map(str, folders))
    assert fresh_interpreter("import colorsys", environ={"PYTHONPATH": path}).out == "a\n"


def test_variables_are_set_and_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE_A", "1")
    monkeypatch.setenv("MINE_B", "2")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    code = """
    import os, sys
    print({name: value for name, value in os.environ.items() if name.startswith("MINE")})
    print(sys.dont_write_bytecode)
    """
    done = fresh_interpreter(code, environ={"MINE_B": None, "MINE_C": "3"})
    assert done.out == "{'MINE_A': '1', 'MINE_C': '3'}\nFalse\n"
    assert fresh_interpreter(code, environ={"PYTHONDONTWRITEBYTECODE": "1"}).out.endswith("True\n")


def test_warnings_are_errors_unless_they_are_let_go() -> None:
    code = "import warnings; warnings.warn('old'); print('went on')"
    done = fresh_interpreter(code)
    assert (done.status, done.out) == (1, "")
    assert "UserWarning: old" in done.err
    assert fresh_interpreter(code, environ={"PYTHONWARNINGS": None}).out == "went on\n"


def test_arguments_a_folder_and_something_typed(tmp_path: Path) -> None:
    done = fresh_interpreter(
        "import os, sys; print(sys.argv, os.getcwd(), sys.stdin.read())",
        "a",
        Path("b"),
        cwd=tmp_path,
        typed="text",
    )
    assert done.out == f"['-c', 'a', 'b'] {tmp_path} text\n"
    assert fresh_interpreter("print(repr(input()))").err.endswith(
        "EOFError: EOF when reading a line\n"
    )


def test_another_interpreter_has_its_own_path(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    python = str(tmp_path / "env" / "bin" / "python")
    done = fresh_interpreter(
        "import sys, importlib.util as u; print(sys.prefix, u.find_spec('torch'))",
        python=python,
        environ={"PYTHONPATH": None},
    )
    assert done.out == f"{tmp_path / 'env'} None\n"


def test_time_that_is_up_tells_what_was_printed_and_where_it_stood(tmp_path: Path) -> None:
    code = f"""
    import os, pathlib, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
    print("so far")
    print("so bad", file=sys.stderr)
    def wait_for_ever():
        time.sleep(600)
    wait_for_ever()
    """
    with pytest.raises(TimeoutError) as raised:
        fresh_interpreter(code, timeout=3)
    told = str(raised.value)
    assert told.startswith(
        "a fresh interpreter was not done after 3 s; until then it printed\nso far\n\n"
        "and on standard error\nso bad\n"
    )
    assert 'File "<fresh>", line 8 in wait_for_ever' in told
    # What it started is gone too: nobody is left who could answer.
    with pytest.raises(ProcessLookupError):
        _wait_until_gone(int((tmp_path / "child").read_text()))


def _wait_until_gone(pid: int) -> None:
    """Killed processes are there until their new parent has taken note."""
    for _ in range(1000):
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            raise ProcessLookupError
        signal.sigtimedwait([], 0.01)


def test_one_that_ignores_the_signal_is_ended_all_the_same() -> None:
    code = """
    import faulthandler, signal, time
    faulthandler.disable()
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    print("ready")
    time.sleep(600)
    """
    with pytest.raises(TimeoutError, match=r"printed\nready\n\nand on standard error\n.nothing.$"):
        fresh_interpreter(code, timeout=2)


def test_a_session_of_its_own_or_this_one() -> None:
    code = "import os; print(os.getsid(0) == os.getpid(), os.getsid(0))"
    assert fresh_interpreter(code).out.startswith("True")
    assert fresh_interpreter(code, session=False).out == f"False {os.getsid(0)}\n"


def test_the_module_imports_neither_torch_nor_pytest() -> None:
    done = fresh_interpreter("import torchweft.testing.interpreter")
    assert done.status == 0, done.err
    assert done.loaded.isdisjoint({"torch", "numpy", "pytest"})
    assert "torchweft.testing.interpreter" in done.loaded
