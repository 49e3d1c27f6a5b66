"""A plugin on trial: what its modules and functions do to the fresh interpreter that runs them.

Each step is looked at by itself, so that what one does is not another's fault. Importing this
module imports no torch; nothing that a plugin may not import is needed to watch it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pickle
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torchweft import specs
from torchweft.discovery import Found
from torchweft.manager import HookCall, Manager
from torchweft.specs import Availability, load_target

__all__ = ["HEAVY", "Report", "Tried", "with_torch", "without_torch"]

#: What nothing that is imported to list and to decide may import.
HEAVY = ("torch", "numpy")

#: Character devices that are no accelerator.
_HARMLESS = tuple(
    f"/dev/{name}"
    for name in ("console", "full", "null", "ptmx", "pts/", "random", "tty", "urandom", "zero")
)

#: What stands between a step and the code of a plugin.
_OURS = (__file__, specs.__file__, importlib.__file__, "<frozen importlib")

#: Beginnings of Python's audit events that are input or output.
_IO = (
    "open",
    "os.",
    "shutil.",
    "socket.bind",
    "socket.connect",
    "socket.get",
    "socket.send",
    "sqlite3.",
    "subprocess.",
    "tempfile.",
    "urllib.",
)


@dataclass(slots=True, kw_only=True)
class Tried:
    """What one step did.

    Attributes:
        error: why it did not end well, ``"ValueError: no"``; empty when it did.
        trace: the traceback of that error.
        imported: by name of a module in ``HEAVY``, the line that imported it.
        touched: devices that are open, or initialised, since then.
        did: files, sockets, processes and threads that it opened or started.
        answer: what it returned, as ``repr`` writes it.
        availability: the same, where it is one.
    """

    error: str = ""
    trace: str = ""
    imported: dict[str, str] = field(default_factory=dict)
    touched: tuple[str, ...] = ()
    did: tuple[str, ...] = ()
    answer: str = ""
    availability: Availability | None = None


@dataclass(slots=True, kw_only=True)
class Report:
    """What the steps did, each by its target or module.

    Attributes:
        ended: how the interpreter ended, where it left no report.
        hooks: the import of the hooks module.
        specs: what the hooks declared, as ``repr`` writes it.
        targets: calls of probes and detections, and imports of classes.
        constructed: classes that were constructed with their defaults.
        preloaded: modules that were imported, as before a fork.
        answers: by hook, what is wrong with its answer; empty when nothing is.
    """

    ended: str = ""
    hooks: Tried = field(default_factory=Tried)
    specs: str = ""
    targets: dict[str, Tried] = field(default_factory=dict)
    constructed: dict[str, Tried] = field(default_factory=dict)
    preloaded: dict[str, Tried] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)


def without_torch(
    path: str, found: dict[str, str], hooks: str, probes: Iterable[str], detections: Iterable[str]
) -> None:
    """Import a module of ``hooks``, ask its probes and detections, and leave a report at ``path``.

    ``found``: the fields of ``Found`` that are text.
    """
    report = Report()
    report.hooks = _step(lambda: importlib.import_module(hooks), _open_devices)
    if not report.hooks.error:
        module = sys.modules[hooks]
        declared = Manager({}).add(Found(**found, module=module))  # type: ignore[arg-type]
        report.specs = repr(declared.specs) if not declared.error else declared.error
        for target, arguments in _calls(probes, detections):
            step = _Call(target, arguments)
            report.targets[target] = _apart(lambda step=step: _step(step, _open_devices))  # type: ignore[misc]
    _leave(path, report)


def with_torch(
    path: str,
    plugin: str,
    probes: Iterable[str],
    detections: Iterable[str],
    targets: Iterable[str],
    constructible: Iterable[str],
    preload: Iterable[str],
) -> None:
    """The same questions after torch was imported, and those that need it."""
    import torch  # noqa: F401  (its device modules are watched)

    report = Report()
    for target, arguments in _calls(probes, detections):
        report.targets[target] = _step(_Call(target, arguments), _devices)
    for target in targets:
        report.targets[target] = _step(lambda target=target: load_target(target, ""), _devices)  # type: ignore[misc]
    audit = _Audit()
    for target in constructible:
        report.constructed[target] = _construct(target, audit)
    hazards = _Hazards()
    for module in preload:
        report.preloaded[module] = _step(
            lambda module=module: importlib.import_module(module),  # type: ignore[misc]
            lambda: _devices() | hazards.now(),
        )
    report.answers = _ask(plugin)
    _leave(path, report)


def _leave(path: str, report: Report) -> None:
    Path(path).write_bytes(pickle.dumps(report))


@dataclass(frozen=True, slots=True)
class _Call:
    """A probe or a detection and what it is given."""

    target: str
    arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        return load_target(self.target, "")(*self.arguments)


def _calls(probes: Iterable[str], detections: Iterable[str]) -> Iterator[tuple[str, Any]]:
    yield from ((probe, ()) for probe in probes)
    yield from ((detection, ({},)) for detection in detections)


def _step(step: Callable[[], Any], look: Callable[[], set[str]]) -> Tried:
    tried = Tried()
    before, loaded = look(), set(sys.modules)
    importers = _Importers()
    sys.meta_path.insert(0, importers)
    try:
        answer = step()
        tried.answer = repr(answer)
        tried.availability = answer if isinstance(answer, Availability) else None
    except (Exception, SystemExit) as error:
        tried.error = f"{type(error).__name__}: {error}"
        tried.trace = _trace(error)
    finally:
        sys.meta_path.remove(importers)
    tried.imported = {
        name: importers.lines.get(name, "")
        for name in HEAVY
        if name in sys.modules and name not in loaded
    }
    tried.touched = tuple(sorted(look() - before))
    return tried


def _trace(error: BaseException) -> str:
    """The traceback from the plugin's first line on."""
    first = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_OURS):
        first = first.tb_next
    return "".join(traceback.format_exception(type(error), error, first))


class _Importers:
    """Notes where heavy modules are first asked for. Finds none itself."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Note the line that imports ``name``."""
        if name in HEAVY and name not in self.lines:
            frame = inspect.currentframe()
            while frame is not None and (frame.f_code.co_filename.startswith(_OURS)):
                frame = frame.f_back
            if frame is not None:
                self.lines[name] = f"{frame.f_code.co_filename}, line {frame.f_lineno}"


def _apart(step: Callable[[], Tried]) -> Tried:
    """Do a step in a forked child, so that the next one finds the process as this one did."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            with open(writer, "wb") as file:
                file.write(pickle.dumps(step()))
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not data:
        return Tried(error=f"it ended the interpreter (status {status})")
    tried: Tried = pickle.loads(data)
    return tried


# -- devices ---------------------------------------------------------------------------------------


def _open_devices() -> set[str]:
    """Device files that this process holds open."""
    folder = Path("/proc/self/fd")
    found = set()
    for entry in folder.iterdir() if folder.is_dir() else ():
        try:
            path = os.readlink(entry)
            device = stat.S_ISCHR(os.fstat(int(entry.name)).st_mode)
        except OSError:  # it was closed meanwhile
            continue
        if device and not path.startswith(_HARMLESS):
            found.add(f"{path} is open")
    return found


def _devices() -> set[str]:
    """The same, and torch's device modules that are initialised."""
    modules = list(vars(sys.modules["torch"]).items())
    return _open_devices() | {
        f"torch.{name} is initialised"
        for name, module in modules
        if isinstance(module, ModuleType)
        and callable(asked := getattr(module, "is_initialized", None))
        and asked()
    }


class _Hazards:
    """What the accelerators that are here have against a fork."""

    def __init__(self) -> None:
        from torchweft.catalog import Catalog, probe

        entries = Catalog(Manager.from_entry_points({}).declared).entries("accelerator")
        self._asked: dict[str, Callable[[], str | None]] = {}
        for entry in entries:
            if probe(entry).ok:
                try:
                    made = load_target(entry.spec.target, entry.provider)()
                except Exception:  # one that needs options, or is broken, says nothing
                    continue
                self._asked[entry.spec.name] = made.fork_hazard

    def now(self) -> set[str]:
        """A sentence for each that says no."""
        said = {name: asked() for name, asked in self._asked.items()}
        return {f"accelerator '{name}' says: {why}" for name, why in said.items() if why}


# -- constructors ----------------------------------------------------------------------------------


class _Audit:
    """Input and output that Python itself does, while it is listened to."""

    def __init__(self) -> None:
        self.events: list[str] | None = None
        # There is no way to remove one, which is why this is done in an interpreter of its own.
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.events is not None and event.startswith(_IO):
            told = ", ".join(repr(each) for each in arguments[:1])
            self.events.append(f"{event}({told})")


def _construct(target: str, audit: _Audit) -> Tried:
    events: list[str] = []

    def twice() -> None:
        cls = load_target(target, "")
        # The first one may import what it needs, which is reading files too.
        cls()
        before = threading.active_count()
        audit.events = events
        try:
            cls()
        finally:
            audit.events = None
        if threading.active_count() > before:
            events.append("it started a thread")

    tried = _step(twice, _devices)
    tried.did = tuple(dict.fromkeys(events))
    return tried


# -- answers ---------------------------------------------------------------------------------------


def _ask(plugin: str) -> dict[str, str]:
    """Make and launch a run of one process on the CPU, in which each hook is called."""
    from torchweft.errors import TorchweftError
    from torchweft.testing.recorder import HookRecorder

    recorder = HookRecorder()
    # An objection, or a hook that raised, is recorded.
    with contextlib.suppress(TorchweftError):
        recorder().fabric.launch()
    calls = [call for call in recorder.calls if call.plugin == plugin and call.arguments]
    return {call.hook: _wrong(call) for call in calls}


def _wrong(call: HookCall) -> str:
    if call.error is not None:
        return f"raised {type(call.error).__name__}: {call.error}"
    return _CHECKS[call.hook](call.result)


def _wrong_sentences(result: Any) -> str:
    if isinstance(result, str) or not isinstance(result, Iterable):
        return f"returned {result!r}, and not a list of sentences"
    for each in result:
        if not isinstance(each, str) or not each.strip():
            return f"returned {each!r} among its sentences"
    return ""


def _wrong_context(result: Any) -> str:
    if isinstance(result, AbstractContextManager):
        return ""
    return f"returned {result!r}, and not a context manager"


_CHECKS: dict[str, Callable[[Any], str]] = {
    "torchweft_check_plan": _wrong_sentences,
    "torchweft_worker_context": _wrong_context,
}
