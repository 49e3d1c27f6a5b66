"""The script that launchers under test run: every rank says who it is, or ends in some way.

Usage: FOLDER WHAT [WORD…]. It is copied to a folder of its own and run from there; ``FOLDER``
holds what it is to do, and gets what every process has to say.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from torchweft import Fabric
from torchweft.errors import RankFailed
from torchweft.specs import load_target
from torchweft.testing.meeting import Meeting

#: How a rank fails.
FAILURES = ("raise", "exit", "kill")
#: Set by the script before it makes processes.
EXPORTED = "EXPORTED_BY_THE_SCRIPT"


def main() -> None:
    """Launch as the settings say, and do ``WHAT`` in every rank."""
    folder, what = Path(sys.argv[1]), sys.argv[2]
    settings = _settings(folder)
    os.environ[EXPORTED] = "yes"
    fabric = _fabric(settings, launcher=settings["launcher"])
    if what == "functions":
        _call_functions(fabric, folder)
    elif settings["function"]:
        fabric.launch(_PARTS[what], folder)
    else:
        fabric.launch()
        _PARTS[what](fabric, folder)


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    return settings


def _fabric(settings: dict[str, Any], **more: Any) -> Fabric:
    return Fabric(
        accelerator=settings["accelerator"],
        devices=settings["devices"],
        strategy=Meeting(),
        **more,
    )


def _tell(folder: Path, name: str, told: Any) -> None:
    """Leave it where the test finds it, one file for each process."""
    (folder / f"{name}-{os.getpid()}.json").write_text(json.dumps(told))


# -- in the process that calls functions ----------------------------------------------------------


def _call_functions(fabric: Fabric, folder: Path) -> None:
    told: dict[str, Any] = {"pid": os.getpid(), "failed": {}}
    if _settings(folder)["function"]:
        told["without a function"] = _attempt(fabric.launch)
    result = fabric.launch(_answer, folder, 1, "two", keyword=torch.tensor([3.0]))
    told["result"] = {
        **result,
        "tensor": _describe(result["tensor"]),
        "nested": _describe(result["nested"][0]["tensor"]),
    }
    told["unpicklable"] = _attempt(fabric.launch, _generator, folder)
    for how in FAILURES:
        told["failed"][how] = {
            **_attempt(fabric.launch, _PARTS[how], folder),
            "alive": [note["rank"] for note in _notes(folder, how) if _is_alive(note["pid"])],
        }
    _tell(folder, "caller", told)


def _attempt(function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """What came of a call, in words."""
    try:
        result = function(*args)
    except BaseException as error:
        is_failure = isinstance(error, RankFailed)
        return {"error": type(error).__name__, "is_failure": is_failure, "words": str(error)}
    return {"error": "", "is_failure": False, "words": "", "returned": type(result).__name__}


def _notes(folder: Path, how: str) -> Iterator[dict[str, Any]]:
    for path in folder.glob(f"{how}-*.json"):
        yield json.loads(path.read_text())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        state = status.read_bytes().rpartition(b")")[2].split()[0] if status.exists() else b"R"
    except OSError:
        return False
    return state != b"Z"


def _describe(tensor: Any) -> list[Any]:
    return [type(tensor).__name__, tensor.device.type, tensor.tolist(), tensor.requires_grad]


# -- in ranks --------------------------------------------------------------------------------------


def _say(fabric: Fabric, folder: Path) -> None:
    """Who this rank is, where it is, and what it finds there."""
    settings = _settings(folder)
    rank = fabric.strategy.place.rank
    mine = torch.tensor(float(rank.rank + 1), device=fabric.device)
    told: dict[str, Any] = {
        **_who(fabric),
        "info": dataclasses.asdict(rank),
        "fabric": [
            fabric.global_rank,
            fabric.world_size,
            fabric.local_rank,
            fabric.node_rank,
            fabric.is_global_zero,
        ],
        "variables": {name: os.environ.get(name) for name in rank.to_environ()},
        "sum": float(fabric.all_reduce(mine, reduce_op="sum")),
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "exported": [os.environ.get("EXPORTED_BY_THE_TEST"), os.environ.get(EXPORTED)],
        "file": sys.modules["__main__"].__file__,
        "stdin": sys.stdin.read() if rank.rank == 0 and sys.stdin is not None else None,
        "second launch": _attempt(fabric.launch),
        "nested": fabric.launch(_pid_and_rank),
    }
    if settings["detect"]:
        told["detected"] = _detected(settings)
    _tell(folder, "said", told)
    # In one piece, wherever it goes.
    sys.stdout.write(f"said by rank {rank.rank}.\n")


def _who(fabric: Fabric) -> dict[str, Any]:
    place = fabric.strategy.place
    return {
        "pid": os.getpid(),
        "rank": place.rank.rank,
        "run_id": place.rank.run_id,
        "port": place.rendezvous.port,
    }


def _pid_and_rank(fabric: Fabric) -> tuple[int, int]:
    return os.getpid(), fabric.global_rank


def _detected(settings: dict[str, Any]) -> dict[str, Any]:
    """What the launcher's detection finds here, and the plan that is made here."""
    found = load_target(settings["detect"], "the conformance kit")(os.environ)
    told: dict[str, Any] = {"detection": found and dataclasses.asdict(found)}
    try:
        plan = _fabric(settings).plan
    except Exception as error:
        return {**told, "launcher": f"{type(error).__name__}: {error}", "why": ""}
    why = next(d.why for d in plan.decisions if d.kind == "launcher")
    return {**told, "launcher": plan.launcher.name, "why": why}


def _answer(
    fabric: Fabric, folder: Path, number: int, word: str, *, keyword: Any
) -> dict[str, Any]:
    """Say who this is, and return what came and tensors of the device."""
    _say(fabric, folder)
    tensor = torch.full((2,), fabric.global_rank + 1.0, device=fabric.device)
    return {
        "rank": fabric.global_rank,
        "arguments": [number, word, _describe(keyword)],
        "tensor": tensor,
        "nested": ({"tensor": tensor[:1]},),
    }


def _generator(fabric: Fabric, folder: Path) -> Any:
    """What cannot be pickled."""
    return (number for number in range(3))


def _raise(fabric: Fabric, folder: Path) -> None:
    _last_of(fabric, folder, "raise")
    give_up()


def give_up() -> NoReturn:
    """Named in the traceback, once in each."""
    raise ValueError("this rank has had enough")


def _exit(fabric: Fabric, folder: Path) -> None:
    _last_of(fabric, folder, "exit")
    os._exit(3)


def _kill(fabric: Fabric, folder: Path) -> None:
    _last_of(fabric, folder, "kill")
    os.kill(os.getpid(), signal.SIGKILL)


def _last_of(fabric: Fabric, folder: Path, how: str) -> None:
    """Return in the last rank alone; the others have better to do."""
    _tell(folder, how, _who(fabric))
    fabric.barrier()
    if fabric.global_rank != fabric.world_size - 1:
        time.sleep(600)


def _wait(fabric: Fabric, folder: Path) -> None:
    """Until it is interrupted."""
    fabric.barrier()
    _tell(folder, "waits", _who(fabric))
    # In steps: Python sleeps through a signal that comes just before the system call.
    while True:
        time.sleep(0.1)


_PARTS: dict[str, Callable[[Fabric, Path], None]] = {
    "well": _say,
    "interrupt": _wait,
    "raise": _raise,
    "exit": _exit,
    "kill": _kill,
}


if __name__ == "__main__":
    main()
