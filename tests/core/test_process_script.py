from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.core.fresh_python import python

from torchweft.process import ERROR_FILE

RUN = (
    "import os, sys\n"
    "from torchweft import process\n"
    "path, *arguments = sys.argv[1:]\n"
    "os._exit(process.run_script(path, arguments))\n"
)

SAYS = '''"""What this is.

More of it."""
import inspect, json, pickle, sys, typing
class Made:
    part: int = 1
def f():
    return "f"
main = sys.modules["__main__"]
said = {name: repr(value) for name, value in vars(main).items() if name.startswith("__")}
said["__builtins__"] = type(__builtins__).__name__
said["__loader__"] = [type(__loader__).__name__, __loader__.name, __loader__.path]
said["source"] = inspect.getsource(f)
said["pickled"] = type(pickle.loads(pickle.dumps(Made()))) is Made
said["hints"] = repr(typing.get_type_hints(Made))
said["argv"] = [sys.argv, sys.orig_argv[1:]]
said["path"] = sys.path[0]
said["main"] = sys.modules["__mp_main__"] is main if "multiprocessing" in sys.modules else True
print(json.dumps(said))
'''


@pytest.fixture
def script(tmp_path: Path):  # type: ignore[no-untyped-def]
    def write(source: str | bytes, name: str = "script.py") -> Path:
        path = tmp_path / name
        path.write_bytes(source.encode() if isinstance(source, str) else source)
        return path

    return write


def by_hand(path: Path | str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        check=False,
    )


def ran(path: Path | str, *arguments: str, error: Path | None = None, **options: object):  # type: ignore[no-untyped-def]
    environ = {ERROR_FILE: str(error) if error else None, "RANK": None}
    return python(RUN, str(path), *arguments, environ=environ, **options)  # type: ignore[arg-type]


def test_it_sees_what_it_sees_by_hand(script, tmp_path: Path) -> None:
    path = script(SAYS)
    link = tmp_path / "elsewhere" / "link.py"
    link.parent.mkdir()
    link.symlink_to(path)
    for name in (path, link, "script.py", "elsewhere/link.py"):
        mine = json.loads(ran(name, "--a", "b", cwd=tmp_path).stdout)
        expected = json.loads(by_hand(name, "--a", "b", cwd=tmp_path).stdout)
        assert mine == expected


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (b"# -*- coding: latin-1 -*-\nprint(ascii('\xe9'))\n", "'\\xe9'\n"),
        (b"\xef\xbb\xbfprint(ascii('\xc3\xa9'))\n", "'\\xe9'\n"),
        (b"def f(a: int): pass\nprint(f.__annotations__)\n", "{'a': <class 'int'>}\n"),
        (
            (b"from __future__ import annotations\ndef f(a: int): pass\n"
            b"print(f.__annotations__)\n"),
            "{'a': 'int'}\n",
        ),
        (b"print('no newline at the end')", "no newline at the end\n"),
        (b"print('dos')\r\nprint('lines')\r\n", "dos\nlines\n"),
        (b"import sys\nprint(sys.modules['__main__'].__file__ == __file__)\n", "True\n"),
    ],
)  # fmt: skip
def test_every_kind_of_file(source: bytes, said: str, script, tmp_path: Path) -> None:
    path = script(source)
    assert by_hand(path, cwd=tmp_path).stdout == said
    done = ran(path)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(0)", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('words')", 1, "words\n"),
        ("exit(4)", 4, ""),
        ("raise SystemExit", 0, ""),
        ("import os; os._exit(5)", 5, ""),
    ],
)
def test_every_kind_of_end(end: str, status: int, said: str, script, tmp_path: Path) -> None:
    path = script(end)
    done = ran(path)
    assert (done.returncode, done.stderr) == (status, said)
    hand = by_hand(path, cwd=tmp_path)
    assert (hand.returncode, hand.stderr) == (status, said)


@pytest.mark.parametrize(
    ("source", "message", "lines"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero", 2),
        ("def f(:\n    pass\n", "SyntaxError: invalid syntax", 0),
        ("x = 'never closed\n", "SyntaxError: unterminated string literal", 0),
        (b"'\xff'\n", "SyntaxError: (unicode error) 'utf-8' codec can't decode", 0),
        (b"# coding: nonsense\n", "SyntaxError: unknown encoding: nonsense", 0),
        ("import nothing_there\n", "ModuleNotFoundError: No module named 'nothing_there'", 2),
        ("raise KeyboardInterrupt\n", None, 0),
    ],
)
def test_every_kind_of_error(
    source: str | bytes, message: str | None, lines: int, script, tmp_path: Path
) -> None:
    path, error = script(source), tmp_path / "error.json"
    done = ran(path, error=error)
    if message is None:
        assert (done.returncode, error.exists()) == (130, False)
        return
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(error.read_text())["message"]
    assert told["message"].startswith(message)
    trace = told["extraInfo"]["py_callstack"]
    assert "run_script" not in trace
    assert "process/" not in trace
    if lines:
        assert trace.splitlines()[1] == f'  File "{path}", line 1, in <module>'


def test_a_script_that_cannot_be_read(tmp_path: Path) -> None:
    error = tmp_path / "error.json"
    assert ran(tmp_path / "gone.py", error=error).returncode == 1
    assert "FileNotFoundError" in json.loads(error.read_text())["message"]["message"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P came with Python 3.11")
def test_a_safe_path_stays_so(script, tmp_path: Path) -> None:
    path = script("import sys\nprint(sys.path[0])\n")
    expected = subprocess.run(
        [sys.executable, "-P", path], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == expected


# -- modules and calls ----------------------------------------------------------------------------

RUN_MODULE = RUN.replace("run_script(path,", "run_module(path,")


def test_a_module_sees_what_it_sees_by_hand(tmp_path: Path) -> None:
    package = tmp_path / "parcel"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "near.py").write_text("NEAR = 'near'\n")
    (package / "train.py").write_text(f"{SAYS}from .near import NEAR\nprint(NEAR)\n")
    words = ("-m", "parcel.train", "--lr", "0.1")
    by_python = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert by_python.returncode == 0, by_python.stderr
    done = python(RUN_MODULE, *words[1:], cwd=tmp_path, environ={ERROR_FILE: None, "RANK": None})
    assert done.returncode == 0, done.stderr
    assert said(done.stdout) == said(by_python.stdout)


def said(printed: str) -> tuple[dict[str, object], str]:
    """What the module told of itself, but where in memory it is, and what it found beside it."""
    first, near = re.sub(r"0x[0-9a-f]+", "…", printed).splitlines()
    return json.loads(first), near


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    error = tmp_path / "error.json"
    environ = {ERROR_FILE: str(error), "RANK": None}
    done = python(RUN_MODULE, "parcel.nowhere", cwd=tmp_path, environ=environ)
    assert (done.returncode, done.stderr) == (1, "")
    assert "No module named 'parcel'" in json.loads(error.read_text())["message"]["message"]


@pytest.mark.parametrize(
    ("call", "status", "told"),
    [
        ("lambda: 7", 0, ""),
        ("lambda: sys.exit(3)", 3, ""),
        ("lambda: 1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("lambda: None", 1, "TypeError: nothing came back"),
    ],
)
def test_what_a_call_returns_is_handed_over(
    tmp_path: Path, call: str, status: int, told: str
) -> None:
    error = tmp_path / "error.json"
    code = (
        "import os, sys\n"
        "from torchweft import process\n"
        "def hand_over(result):\n"
        "    if result is None:\n"
        "        raise TypeError('nothing came back')\n"
        "    print('handed over', result)\n"
        f"os._exit(process.run_call({call}, hand_over))\n"
    )
    done = python(code, environ={ERROR_FILE: str(error), "RANK": None})
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout == ("handed over 7\n" if not status else "")
    assert error.exists() == bool(told)
    if told:
        message = json.loads(error.read_text())["message"]
        assert message["message"] == told
        # Nothing of what led to the call.
        assert "process/script.py" not in message["extraInfo"]["py_callstack"]
