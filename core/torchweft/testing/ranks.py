"""Real ranks for a test: forks of a server that has imported torch once, watched by a clock."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from torchweft import process
from torchweft.api import RunPlan, pack_result
from torchweft.builtin.launchers.function import ForkServer, enter_rank, guard_served_rank
from torchweft.builtin.launchers.node import Node
from torchweft.builtin.launchers.results import Results
from torchweft.catalog import Catalog
from torchweft.errors import InvalidRequest, TorchweftError
from torchweft.fabric import Fabric
from torchweft.manager import Manager
from torchweft.testing.stacks import main_frames, standing

__all__ = ["RanksTimeout", "environment", "run_ranks"]

#: Seconds that a rank may need to write its stacks.
_PATIENCE = 10.0


class RanksTimeout(TorchweftError):  # noqa: N818
    """Ranks were not done in time; the message tells where each of them stands."""


def run_ranks(
    n: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    environ: Mapping[str, str] | None = None,
    accelerator: Any = "cpu",
    **fabric: Any,
) -> list[Any]:
    """Call ``function(fabric, *args)`` in every rank of a run on ``n`` devices of this node.

    The ranks are real processes, forked from a server that has imported torch once, so that a run
    takes a fraction of a second. ``function`` has to be a module's own, not made in a function.

    Args:
        n: number of devices; the strategy decides how many processes that makes.
        function: what every rank calls.
        args: its further arguments; they are pickled.
        timeout: seconds that the function may take, and as many to come to it, before the ranks
            are ended.
        environ: variables for the plan and the ranks.
        accelerator: as ``Fabric`` takes it.
        fabric: the other arguments of ``Fabric``: ``strategy=``, ``precision=``, ``plugins=``, ….

    Returns:
        What each rank returned, by rank; tensors on the CPU.

    Raises:
        RankFailed: when a rank failed; its words name rank and cause.
        RanksTimeout: when they were not done in time: where each rank stands, and all stacks.
    """
    if "<locals>" in getattr(function, "__qualname__", "<locals>"):
        raise InvalidRequest(
            f"run_ranks() was given {function!r}, which ranks cannot import; define it with def "
            "at the top level of a module"
        )
    with _folder() as folder, environment(environ or {}):
        launcher = _Watched(timeout=timeout, folder=folder, modules=_modules(function))
        made = Fabric(accelerator=accelerator, devices=n, launcher=launcher, **fabric)
        made.launch(_report, function, args, folder, timeout)
        ranks = range(made.plan.topology.world_size)
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in ranks]


def _report(
    fabric: Fabric, function: Callable[..., Any], args: Any, folder: Path, timeout: float
) -> None:
    """Leave what the function returned in this rank where the caller finds it."""
    rank = fabric.global_rank
    # The function has all of the time, however long the way to it was.
    with _watch(timeout, folder / f"stack-{rank}"):
        result = function(fabric, *args)
    (folder / f"result-{rank}").write_bytes(pack_result(result, rank))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="torchweft-ranks-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def environment(extra: Mapping[str, str]) -> Iterator[None]:
    """Set variables meanwhile: the plan reads this process's environment, and ranks inherit it."""
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _modules(function: Callable[..., Any]) -> dict[str, str]:
    """The function's module and its file: a test's module may be one that no import finds."""
    module = sys.modules.get(function.__module__)
    file = getattr(module, "__file__", None)
    return {function.__module__: file} if file and function.__module__ != "__main__" else {}


class _Watched(ForkServer):
    """The launcher ``forkserver`` with a clock beside it."""

    def __init__(self, *, timeout: float, folder: Path, modules: Mapping[str, str]) -> None:
        self._timeout = timeout
        self._folder = folder
        self._modules = dict(modules)

    def _prepare(self, context: Any, plan: RunPlan) -> None:
        # There is one server for all tests, so that it imports what any of them may need. A rank
        # also imports the program that made it, which is pytest.
        entries = Catalog(Manager.from_entry_points(os.environ).declared).entries("strategy")
        wanted = {name: None for entry in entries for name in getattr(entry.spec, "preload", ())}
        # torch's optimizers import the compiler, which takes a second.
        common = ["torch._dynamo", "pytest", "torchweft.testing.ranks"]
        modules = [*plan.strategy.preload, *wanted, *common]
        context.set_forkserver_preload(process.served(dict.fromkeys(modules)))

    def _entrance(self) -> Callable[..., NoReturn]:
        return functools.partial(_enter, self._timeout, self._folder, self._modules)

    def _meanwhile(self, results: Results, node: Node) -> Callable[[float], None]:
        deadline = time.monotonic() + self._timeout

        def idle(seconds: float) -> None:
            results.idle(seconds)
            late = time.monotonic() - deadline
            if late < 0:
                return
            left = [
                rank for rank, file in node.error_files.items() if not _is_done(self._folder, file)
            ]
            told = all(_has_told(self._folder, rank) for rank in left)
            # A rank may have come to the function late, and then has time left.
            if told or late > self._timeout + _PATIENCE:
                raise RanksTimeout(_describe(self._folder, node.size, left, self._timeout))

        return idle


def _enter(
    timeout: float,
    folder: Path,
    modules: Mapping[str, str],
    environ: dict[str, str],
    method: str | None,
    call: Path,
    sender: Connection[Any, Any] | None,
) -> NoReturn:
    guard_served_rank()
    with _watch(timeout, folder / f"stack-{environ['RANK']}"):
        for name, file in modules.items():
            _make_importable(name, file)
        enter_rank(environ, method, call, sender)


@contextlib.contextmanager
def _watch(timeout: float, path: Path) -> Iterator[None]:
    """Have all threads' stacks written to ``path`` after ``timeout``, whatever they wait for."""
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{threading.get_ident():x}\n")
        file.flush()
        # There is one such clock in a process: it takes the place of the one before.
        faulthandler.dump_traceback_later(timeout, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _make_importable(name: str, file: str) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


# -- what is told when time is up ------------------------------------------------------------------


def _is_done(folder: Path, error_file: Path) -> bool:
    return process.done_file(error_file).exists()


def _has_told(folder: Path, rank: int) -> bool:
    """Whether the rank has written its stacks; the main thread's comes last."""
    main, _, text = _stack(folder, rank)
    return bool(main_frames(text, main)) and text.endswith("\n")


def _stack(folder: Path, rank: int) -> tuple[int, str, str]:
    try:
        head, _, text = (folder / f"stack-{rank}").read_text(encoding="utf-8").partition("\n")
        return int(head, 16), head, text
    except (OSError, ValueError):
        return 0, "", ""


def _describe(folder: Path, size: int, left: list[int], timeout: float) -> str:
    head = [f"after {timeout:g} s {len(left)} of {size} ranks were not done"]
    if not left:
        head = [
            f"after {timeout:g} s all {size} ranks were done, and their processes had not ended"
        ]
    for rank in range(size):
        main, _, text = _stack(folder, rank)
        where = standing(main_frames(text, main)) if rank in left else "done"
        head.append(f"rank {rank}: {where}")
    lines = list(head)
    for rank in left:
        lines += ["", f"the stacks of rank {rank}, innermost call first:"]
        lines.append(_stack(folder, rank)[2].strip() or "it has written none")
    # Said again where the eye is at the end of long output.
    return "\n".join([*lines, "", *head] if left else lines)
