"""Real runs of a launcher: the script in fresh interpreters, and what its processes said."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchweft.testing import launched
from torchweft.testing.commands import Command, Result, clean_environment, listens

__all__ = ["TYPED", "WORDS", "Launched", "Launches"]

#: What the script gets behind its own arguments, and on its standard input.
WORDS = ("--lr", "0.1", "two words")
TYPED = "typed\n"
#: Seconds in which a socket may close behind its process.
_PATIENCE = 2.0


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What came of one run of the script.

    Attributes:
        result: how the command ended.
        said: what each process said that came to be a rank.
        caller: what the process said that called ``launch(function)``, if one did.
        notes: by kind of failure, of each rank who it was.
        left: processes that ran on afterwards.
        listening: ports of the ranks' stores on which somebody still listened.
        folder: where the script's arguments pointed.
        cwd: where it was started.
    """

    result: Result
    said: list[dict[str, Any]]
    caller: dict[str, Any]
    notes: Mapping[str, list[dict[str, Any]]]
    left: list[str]
    listening: list[int]
    folder: Path
    cwd: Path

    @property
    def printed(self) -> str:
        """All of it, for a message."""
        return f"\n--- out\n{self.result.out}\n--- err\n{self.result.err}"


class Launches:
    """Runs the script in several ways, two at a time, each once.

    Args:
        command: words with the placeholders ``{python}``, ``{n}`` and ``{script}``.
        settings: for the script.
        environ: variables for it.
        folder: empty, for this alone.
        timeout: seconds for each run.
    """

    def __init__(
        self,
        *,
        command: Sequence[str],
        settings: Mapping[str, Any],
        environ: Mapping[str, str],
        folder: Path,
        timeout: float,
    ) -> None:
        self._command = list(command)
        self._settings = dict(settings)
        self._environ = dict(environ)
        self._folder = folder
        self._timeout = timeout
        self._runs: dict[str, Future[Launched]] = {}
        self._commands: list[Command] = []
        self._lock = threading.Lock()
        self._closed = False
        # Most of a run is waiting: for torch to be imported on one core, for processes to end.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="launches")

    def start(self, names: Iterable[str]) -> None:
        """Begin those that were not begun yet, in the background."""
        for name in names:
            if name not in self._runs:
                self._runs[name] = self._pool.submit(self._launch, name)

    def of(self, name: str) -> Launched:
        """What came of one; raises ``TimeoutError`` where it had no end."""
        self.start([name])
        return self._runs[name].result()

    def close(self) -> None:
        """End what still runs, and what it left behind."""
        for future in self._runs.values():
            future.cancel()
        with self._lock:
            self._closed = True
            for command in self._commands:
                command.kill()
        self._pool.shutdown()

    # -- one run ---------------------------------------------------------------------------------

    def _launch(self, name: str) -> Launched:
        folder, cwd = self._folder / name, self._folder / f"{name}-cwd"
        folder.mkdir()
        cwd.mkdir()
        script = folder / "train.py"
        shutil.copyfile(launched.__file__, script)
        (folder / "settings.json").write_text(json.dumps(self._settings))
        places = {"python": sys.executable, "n": self._settings["devices"], "script": str(script)}
        words = [word.format(**places) for word in self._command]
        # What is printed is to be held in memory, as it is where nobody looks on.
        own = {"EXPORTED_BY_THE_TEST": "yes", "PYTHONUNBUFFERED": ""}
        environ = clean_environment({**own, **self._environ})
        with self._lock:
            if self._closed:
                raise TimeoutError("the tests are over")
            command = Command([*words, str(folder), name, *WORDS], environ, subprocess.PIPE, cwd)
            self._commands.append(command)
        if name == "interrupt":
            self._interrupt(command, folder)
        result = command.finish(self._timeout, TYPED)
        left = command.left()
        notes = {how: _read(folder, how) for how in launched.FAILURES}
        said = _read(folder, "said")
        ports = {note["port"] for note in itertools.chain(said, *notes.values())} - {0}
        return Launched(
            result=result,
            said=said,
            caller=next(iter(_read(folder, "caller")), {}),
            notes=notes,
            left=left,
            listening=_still_listening(ports),
            folder=folder,
            cwd=cwd,
        )

    def _interrupt(self, command: Command, folder: Path) -> None:
        """Ctrl-C, once all ranks wait."""
        deadline = time.monotonic() + self._timeout
        while len(_read(folder, "waits")) < self._settings["devices"]:
            # What is wrong shows in how it ends.
            if command.popen.poll() is not None or time.monotonic() > deadline:
                return
            time.sleep(0.05)
        command.interrupt()


def _read(folder: Path, name: str) -> list[dict[str, Any]]:
    """What processes told under a name, by rank where they have one."""
    found = []
    for path in folder.glob(f"{name}-*.json"):
        text = path.read_text()
        if text.endswith("}"):  # it is being written otherwise
            found.append(json.loads(text))
    return sorted(found, key=lambda told: (told.get("rank", 0), told["pid"]))


def _still_listening(ports: Iterable[int]) -> list[int]:
    deadline = time.monotonic() + _PATIENCE
    while (found := [port for port in ports if listens(port)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
