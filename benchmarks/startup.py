"""How long a user waits: for the import, for the list of plugins, for the first DDP step.

Every figure is the wall time of a fresh command, from before it is started. The commands that are
compared take turns, in an order that rotates; a ratio is the median over rounds of a command's
time against the first command's of the same round. The launch is timed to the moment at which
rank 0 has done its first ``optimizer.step()``; then the memory of all of its processes is added up,
each page divided among those that share it (Linux's PSS), in launches of their own.
"""

import argparse
import contextlib
import ctypes
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from report import bars, circumstances, installed, spread, table, write

SCRIPTS = Path(__file__).parent / "first_step"
PYTHON = sys.executable

Timed = Callable[[], float]
Figures = dict[str, dict[str, dict[str, float]]]


def run(command: list[str], limit: float = 300) -> None:
    """Run a command to its end; its output is shown only where it fails."""
    # Without written bytecode every process would compile what it imports.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=limit, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def until_it_ends(*command: str) -> Timed:
    """Times a command from before its start to its end."""

    def timed() -> float:
        start = time.time()
        run([PYTHON, *command])
        return time.time() - start

    return timed


def until_first_step(launcher: list[str], script: str, *arguments: str) -> Timed:
    """Times a launch from before the command's start to what rank 0 of the script wrote."""

    def timed() -> float:
        with tempfile.TemporaryDirectory() as folder:
            stamp = Path(folder, "done")
            start = time.time()
            run([PYTHON, *launcher, str(SCRIPTS / script), str(stamp), *arguments])
            return float(stamp.read_text()) - start

    return timed


def memory_of(launcher: list[str], script: str, *arguments: str) -> Timed:
    """Measures the MiB of all processes of a launch, the launcher too, behind the first step."""

    def measured() -> float:
        with tempfile.TemporaryDirectory() as folder:
            stamp = Path(folder, "done")
            hold = Path(f"{stamp}.hold")
            hold.touch()
            environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
            command = [PYTHON, *launcher, str(SCRIPTS / script), str(stamp), *arguments]
            with subprocess.Popen(
                command,
                env={**environ, MARK: folder},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ) as job:
                while not stamp.exists():
                    if job.poll() is not None:
                        raise SystemExit(f"{' '.join(command)} failed")
                    time.sleep(0.05)
                time.sleep(1)  # the others do their step at the same time, or nearly
                shared_out = sum(map(proportional, marked(folder)))
                hold.unlink()
            return shared_out / 1024

    return measured


#: A variable by which all processes of a launch are known.
MARK = "FIRST_STEP_MARK"


def marked(mark: str) -> list[Path]:
    """The folders in /proc of the processes that carry a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder)
    return found


def proportional(folder: Path) -> int:
    """KiB of a process, each page divided among those that share it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = (folder / "smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return 0


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def imports() -> dict[str, Timed]:
    return {
        "import torch": until_it_ends("-c", "import torch"),
        "import torchweft; torchweft.Fabric": until_it_ends(
            "-c", "import torchweft; torchweft.Fabric"
        ),
    }


def listing() -> dict[str, Timed]:
    return {
        "python -c pass": until_it_ends("-c", "pass"),
        "torchweft plugins": until_it_ends("-m", "torchweft", "plugins"),
    }


def launches(count: int, measure: Callable[..., Timed]) -> dict[str, Timed]:
    """Ways to start ``count`` ranks, ``torchrun`` first; a library that is absent is left out."""
    n = str(count)
    # Its default but for the port, which might be somebody else's. (--standalone is slower.)
    torchrun = ["-m", "torch.distributed.run", "--master-port", free_port(), "--nproc-per-node", n]
    command = ["-m", "torchweft", "run", "--devices", n]
    ways = {
        "torchrun": measure(torchrun, "with_torch.py"),
        "torchweft run": measure(command, "with_torchweft.py"),
        "python, torchweft forks": measure([], "with_torchweft.py", n),
    }
    if installed("lightning"):
        fabric = ["-m", "lightning.fabric.cli", "--accelerator", "cpu", "--devices", n]
        fabric += ["--strategy", "ddp"]
        fabric += ["--main-port", free_port()]
        ways["fabric run"] = measure(fabric, "with_lightning.py")
    if installed("accelerate"):
        # Asked with --cpu for several processes it makes one; without a GPU the other means the
        # CPU, but it wants two at least.
        kind = "--multi_gpu" if count > 1 else "--cpu"
        accelerate = ["-m", "accelerate.commands.launch", kind, "--num_processes", n]
        accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        accelerate += ["--main_process_port", free_port()]
        ways["accelerate launch"] = measure(accelerate, "with_accelerate.py")
    return ways


def busy() -> tuple[float, float]:
    """Seconds of processor time that this machine has spent, and those of our ended commands."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    ours = os.times()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), sum(ours[:4])


def adopt_orphans() -> None:
    """Make this process the parent of what a command leaves behind, so that ``busy`` counts it."""
    PR_SET_CHILD_SUBREAPER = 36  # noqa: N806 - Linux spells it so
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def wait_for_orphans() -> None:
    """Return when no process of an ended command is left."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def of_others(since: tuple[float, float]) -> float:
    """Seconds of processor time that other programs took since ``busy`` returned ``since``."""
    whole, ours = busy()
    return (whole - since[0]) - (ours - since[1])


def undisturbed(timed: Timed, most: float = 0.05, patience: float = 1800) -> float:
    """Time once others are idle, and again where they then took more than ``most`` of a core."""
    until = time.time() + patience
    while time.time() < until:
        before = busy()
        time.sleep(1)
        if of_others(before) > most:
            continue
        before, start = busy(), time.time()
        seconds = timed()
        wait_for_orphans()
        # The machine counts in hundredths of a second.
        if of_others(before) < most * (time.time() - start) + 0.03:
            return seconds
    raise SystemExit(f"other programs kept this machine busy for {patience} seconds")


def measure(ways: dict[str, Timed], rounds: int, alone: bool, once: bool = False) -> Figures:
    """Seconds of each, and ratios to the first. Without ``once`` a round before is not counted."""
    if alone:
        adopt_orphans()
        ways = {name: partial(undisturbed, timed) for name, timed in ways.items()}
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names if not once else ():
        ways[name]()
    for round in range(rounds):
        turn = round % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(ways[name]())
    base = times[names[0]]
    return {
        name: {
            "seconds": spread(seconds),
            "ratio": spread([mine / first for mine, first in zip(seconds, base, strict=True)]),
        }
        for name, seconds in times.items()
    }


def heights(results: dict[str, Figures], title: str) -> dict[str, dict[str, float]]:
    """Medians by number of ranks, of what is titled so behind it; MiB for each rank."""
    drawn = {}
    for name, figures in results.items():
        ranks = re.fullmatch(rf"(\d+) ranks{title}", name)
        if ranks:
            share = int(ranks[1]) if title else 1
            drawn[f"{ranks[1]} ranks"] = {
                way: figure["seconds"]["median"] / share for way, figure in figures.items()
            }
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="of each import and listing")
    parser.add_argument("--launches", type=int, default=7, help="of each launcher")
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[1, 2, 8, 32], help="ranks to launch"
    )
    parser.add_argument("--memory", type=int, default=1, help="launches whose memory is measured")
    parser.add_argument("--plot", metavar="PATH", help="draw both by number of ranks there")
    parser.add_argument(
        "--undisturbed", action="store_true", help="Linux: repeat what other programs disturbed"
    )
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    options = parser.parse_args()

    parts = [("import", imports(), options.rounds), ("listing", listing(), options.rounds)]
    for n in options.ranks:
        timed = launches(n, until_first_step)
        parts.append((f"{n} ranks", timed, min(options.launches, 3) if n > 8 else options.launches))
    for n in options.ranks:
        parts.append((f"{n} ranks, MiB of each", launches(n, memory_of), options.memory))
    results = {}
    for title, ways, rounds in parts:
        if rounds < 1:
            continue
        size = int(title.split()[0]) if title.endswith("MiB of each") else 0
        results[title] = measure(ways, rounds, options.undisturbed and not size, once=bool(size))
        rows = [
            [
                name,
                f"{figure['seconds']['median'] / (size or 1):.3f}",
                f"{figure['ratio']['median']:.3f}",
                f"{figure['ratio']['low']:.3f} to {figure['ratio']['high']:.3f}",
            ]
            for name, figure in results[title].items()
        ]
        unit = "MiB" if size else "seconds"
        print(table([title, unit, "ratio", "middle half"], rows), end="\n\n", flush=True)
    if options.plot:
        panels = {"seconds to the first DDP step": "", "MiB of each rank": ", MiB of each"}
        bars(options.plot, {axis: heights(results, of) for axis, of in panels.items()})
    write(
        options.json,
        {
            "benchmark": "startup",
            **circumstances(),
            "options": {k: v for k, v in vars(options).items() if k != "json"},
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
