"""What an actor does: it makes one rank, a process of its own, and tells how it fares.

A process rather than the actor itself: it is a fresh interpreter, as a script expects one; what it
prints arrives whole, however it ends; how it ended is known; and Ray's threads are not in it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torchweft.launching import ERROR_FILE, Failure, done_file, read_failure
from torchweft_ray.environment import moved, without_ray
from torchweft_ray.folder import unpack
from torchweft_ray.program import Program
from torchweft_ray.rank import CALL, PROGRAM, RESULT, SOCKET

__all__ = ["Guard", "Order", "Seen", "Site"]

#: A rank looks for nothing in the current folder, where files may hide a library.
_START = (
    "import sys; sys.path[:1] = sys.path[:1] if sys.path[0] else []; "
    "from torchweft_ray.rank import main; main(sys.argv[1])"
)
#: Seconds between two looks at a rank.
_TICK = 0.05
_CHUNK = 1 << 16
#: Bytes that one look brings back at most.
_MUCH = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where an actor is.

    Attributes:
        host: name of its computer.
        pid: its process.
        devices: ids of the GPUs that Ray gave it.
        sees: whether the working folder is there.
    """

    host: str
    pid: int
    devices: tuple[str, ...]
    sees: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an actor is to start.

    Attributes:
        program: what it runs.
        environ: what it finds in its environment beside the node's own.
        here: the working folder of the process that launches.
        there: that of the rank.
        reads: whether it is to get what is typed.
    """

    program: Program
    environ: Mapping[str, str]
    here: str
    there: str
    reads: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What an actor saw of its rank since the last time.

    Attributes:
        said: what it printed, by descriptor, in order.
        code: how it ended, negative for a signal; None while it runs.
        failure: what it told of its failure.
        done: whether it takes part in nothing any more.
        unread: bytes that were typed and that it has not read.
    """

    said: tuple[tuple[int, bytes], ...] = ()
    code: int | None = None
    failure: Failure | None = None
    done: bool = False
    unread: int = 0


@dataclass(slots=True)
class _Typed:
    """What goes to a rank's standard input, as fast as it reads."""

    descriptor: int
    waiting: bytearray = field(default_factory=bytearray)
    over: bool = False
    closed: bool = False

    def push(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.waiting and not self.closed:
                try:
                    del self.waiting[: os.write(self.descriptor, self.waiting[:_CHUNK])]
                except BrokenPipeError:
                    self.over = True
                    self.waiting.clear()
        if self.over and not self.waiting and not self.closed:
            os.close(self.descriptor)
            self.closed = True


class Guard:
    """The class of the actors. Ray calls its methods one after another, in the main thread."""

    def __init__(self) -> None:
        self._folder = Path()
        self._socket: socket.socket | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._pipes: dict[int, int] = {}
        self._typed: _Typed | None = None
        self._rank = 0

    @property
    def _error_file(self) -> Path:
        return self._folder / "error.json"

    def site(self, witness: str, words: str) -> Site:
        """Where this is; ``witness`` is a file that says ``words`` where the folder is seen."""
        import ray

        sees = False
        with contextlib.suppress(OSError, UnicodeError):
            sees = bool(words) and Path(witness).read_text() == words
        devices = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return Site(host=socket.gethostname(), pid=os.getpid(), devices=tuple(devices), sees=sees)

    def prepare(self, run_id: str, rank: int) -> None:
        """Make a folder for the rank, in that of the run on this computer."""
        self._rank = rank
        self._folder = Path(tempfile.gettempdir()) / f"torchweft-ray-{run_id}" / str(rank)
        self._folder.parent.mkdir(mode=0o700, exist_ok=True)
        self._folder.mkdir()

    def unpack(self, archive: bytes) -> str:
        """Make a copy of the working folder; returns where it is."""
        copy = self._folder / "work"
        copy.mkdir()
        unpack(archive, copy)
        return str(copy)

    def listen(self, address: str) -> int:
        """Bind and listen where the ranks shall meet; returns the port."""
        self._socket = socket.create_server((address, 0), backlog=1024)
        port: int = self._socket.getsockname()[1]
        return port

    def start(self, order: Order, call: bytes) -> None:
        """Make the rank."""
        environ = {**without_ray(os.environ), **order.environ}
        environ[ERROR_FILE] = str(self._error_file)
        inherited = []
        if self._socket is not None:
            inherited = [self._socket.fileno()]
            environ[SOCKET] = str(inherited[0])
        program = order.program
        (self._folder / PROGRAM).write_bytes(pickle.dumps(_moved(program, order)))
        if program.kind == "function":
            (self._folder / CALL).write_bytes(call)
        self._child = subprocess.Popen(
            [sys.executable, *program.flags, "-c", _START, str(self._folder)],
            stdin=subprocess.PIPE if order.reads else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=order.there,
            env=environ,
            pass_fds=inherited,
        )
        if self._socket is not None:
            self._socket.close()
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        for number, pipe in ((1, self._child.stdout), (2, self._child.stderr)):
            os.set_blocking(pipe.fileno(), False)
            self._pipes[pipe.fileno()] = number
        if self._child.stdin is not None:
            self._typed = _Typed(os.dup(self._child.stdin.fileno()))
            self._child.stdin.close()
            os.set_blocking(self._typed.descriptor, False)

    def watch(self, seconds: float) -> Seen:
        """Return once there is news, and after some seconds in any case."""
        assert self._child is not None
        deadline = time.monotonic() + seconds
        while True:
            code = self._child.poll()  # before it is read: what it printed is then all there
            said = self._read(0 if code is not None else _TICK)
            told = self._error_file.exists()
            # Not until its output is closed: a process that it left may hold that open for ever.
            if said or told or code is not None or time.monotonic() > deadline:
                break
        if _size(said) >= _MUCH:
            code = None  # it has said more; its end comes after that
        failure = None
        if told or code:
            failure = read_failure(self._rank, code or 1, self._error_file)
        return Seen(
            said=tuple(said),
            code=code,
            failure=failure,
            done=done_file(self._error_file).exists(),
            unread=len(self._typed.waiting) if self._typed is not None else 0,
        )

    def _read(self, seconds: float) -> list[tuple[int, bytes]]:
        if self._typed is not None:
            self._typed.push()
        said: list[tuple[int, bytes]] = []
        while self._pipes and _size(said) < _MUCH:
            ready = select.select(list(self._pipes), [], [], 0 if said else seconds)[0]
            if not ready:
                break
            for descriptor in ready:
                piece = os.read(descriptor, _CHUNK)
                if piece:
                    said.append((self._pipes[descriptor], piece))
                else:
                    del self._pipes[descriptor]
        if not self._pipes and seconds:
            time.sleep(seconds)  # it closed its output, and goes on
        return said

    def type(self, words: bytes) -> None:
        """Hand on what was typed; nothing at all: no more will come."""
        if self._typed is not None:
            self._typed.waiting += words
            self._typed.over = self._typed.over or not words

    def tell(self, number: int) -> None:
        """Send the rank a signal."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def result(self) -> bytes:
        """What the function returned, pickled; nothing where the rank ended before it returned."""
        path = self._folder / RESULT
        return path.read_bytes() if path.exists() else b""

    def close(self) -> None:
        """Leave nothing behind: no process, no file."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        # All ranks have ended by now, one whose actor was killed among them.
        if self._folder != Path():
            shutil.rmtree(self._folder.parent, ignore_errors=True)


def _size(said: list[tuple[int, bytes]]) -> int:
    return sum(len(piece) for _, piece in said)


def _moved(program: Program, order: Order) -> Program:
    """The program in the folder in which the rank works."""
    here, there = order.here, order.there
    return Program(
        kind=program.kind,
        name=moved(program.name, here, there) if program.kind != "module" else program.name,
        arguments=program.arguments,
        flags=program.flags,
        path=tuple(moved(entry, here, there) for entry in program.path),
    )
