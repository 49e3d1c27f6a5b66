"""Says what a rank sees and leaves things to be done at its end.

Usage: place.py FOLDER [LAUNCHER [ARGUMENT…]]. LAUNCHER: that of launch(function), "script" for
launch(), "again" for launch() where nothing can be forked.
"""

import atexit
import ctypes
import dataclasses
import gzip
import inspect
import json
import logging
import logging.handlers
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import beside
import torch
from torch.utils.data import DataLoader, Dataset

from torchweft import Fabric


@dataclasses.dataclass
class Point:
    """Of this script, as its own processes must find it."""

    x: int


class Points(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Point(index)


def square(point):
    return Point(point.x**2)


def workers(method):
    loader = DataLoader(
        Points(), batch_size=2, num_workers=1, collate_fn=list, multiprocessing_context=method
    )
    return [[point.x for point in batch] for batch in loader]


def pool(method):
    with multiprocessing.get_context(method).Pool(1) as processes:
        return processes.map(square, [Point(3), Point(4)]) == [Point(9), Point(16)]


def main_module():
    main = sys.modules["__main__"]
    return {
        "names": sorted(name for name in vars(main) if name.startswith("__")),
        "file": __file__,
        "doc": (__doc__ or "").splitlines()[0],
        "spec": repr(main.__spec__),
        "package": repr(main.__package__),
        "loader": type(main.__loader__).__name__,
        "is this one": main.Point is Point,
        "argv": sys.argv,
        "path": sys.path[0],
        "folder": os.getcwd(),
        "beside": beside.VALUE,
        "pickled": pickle.loads(pickle.dumps(Point(5))).x,
        "hints": repr(typing.get_type_hints(Point)),
        "source": inspect.getsource(square),
    }


def process():
    return {
        "start method": multiprocessing.get_start_method(allow_none=True),
        "name": multiprocessing.current_process().name,
        "parent": multiprocessing.parent_process() is None,
        "children": len(multiprocessing.active_children()),
        "thread": threading.current_thread() is threading.main_thread(),
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "terminate": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        "child": signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL,
        "held back": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }


def see(fabric, folder):
    rank = fabric.global_rank
    folder = Path(folder)
    said = {
        "rank": [rank, fabric.world_size, os.environ.get("RANK"), os.environ.get("WORLD_SIZE")],
        "main": main_module(),
        "process": process(),
        "set": multiprocessing.set_start_method("spawn"),  # fails where it was set
        "stdin": [sys.stdin.read(), os.read(0, 100).decode()],
        "threads": [torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")],
        "workers": {method: workers(method) for method in ("fork", "spawn")},
        "pool": pool("fork"),
    }
    leave_things_behind(folder, rank, said)
    (folder / f"said-{rank}").write_text(json.dumps(said))


def leave_things_behind(folder, rank, said):
    global kept
    order = folder / f"order-{rank}"

    def note(word):
        with open(order, "a") as file:
            file.write(word + "\n")

    def late():
        time.sleep(0.3)
        note("thread")

    atexit.register(note, "first registered")
    atexit.register(note, "second registered")
    threading.Thread(target=late).start()
    executor = ThreadPoolExecutor(2)
    executor.submit(int).result()
    text = open(folder / f"text-{rank}", "w")  # noqa: SIM115
    text.write("held in memory")
    packed = gzip.open(folder / f"packed-{rank}", "wt")  # noqa: SIM115
    packed.write("held in memory")
    temporary = tempfile.NamedTemporaryFile(dir=folder)  # noqa: SIM115
    directory = tempfile.TemporaryDirectory(dir=folder)
    said["temporary"] = [temporary.name, directory.name]
    target = logging.FileHandler(folder / f"log-{rank}")
    handler = logging.handlers.MemoryHandler(100, target=target)
    logging.getLogger().addHandler(handler)
    logging.getLogger().warning("held in memory")
    loader = DataLoader(
        Points(),
        num_workers=1,
        collate_fn=list,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    next(batches)
    print(f"python {rank}")
    ctypes.CDLL(None).printf(b"library %d\n", rank)
    # Reachable to the very end, as what a script keeps in its globals.
    kept = (executor, text, packed, temporary, directory, loader, batches)


if __name__ == "__main__":
    how = sys.argv[2] if len(sys.argv) > 2 else "script"
    devices = os.environ.get("DEVICES", "auto")
    strategy = "auto" if devices == "1" else "ddp"
    launcher = "auto" if how in ("script", "again") else how
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, launcher=launcher)
    if how == "again":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if launcher == "auto":
        fabric.launch()
        see(fabric, sys.argv[1])
    else:
        fabric.launch(see, sys.argv[1])
