"""Ranks that end in every way. Usage: fail.py HOW FOLDER [LAUNCHER].

LAUNCHER: that of launch(function), or "again" for launch() where nothing can be forked.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from torchweft import Fabric


def end(fabric, how, folder):
    rank = fabric.global_rank
    if how == "early":
        if rank == 1:
            sys.exit(0)
        time.sleep(0.1)
        fabric.all_reduce(1)
    fabric.barrier()
    if how == "zero":
        os._exit(0)
    if how in ("sleep", "save"):
        wait_for_an_end(rank, how == "save", folder)
    if rank == 0:
        # Only its death ends this rank, whatever it is asked.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(folder, "ready").touch()
        time.sleep(600)
    while not Path(folder, "ready").exists():
        time.sleep(0.01)
    Path(folder, "time").write_text(str(time.time()))
    if how == "raise":
        # A thread that never ends does not keep the others waiting.
        threading.Thread(target=threading.Event().wait).start()
        raise ValueError("rank one has had enough")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        sys.exit(3)
    if how == "os._exit":
        os._exit(4)


def wait_for_an_end(rank, save, folder):
    def saved(number, frame):
        time.sleep(3)  # longer than a rank gets where another one failed
        Path(folder, f"saved-{rank}").touch()
        os._exit(0)

    if save and rank == 0:
        signal.signal(signal.SIGTERM, saved)
    Path(folder, f"ready-{rank}").touch()
    try:
        # In steps: Python sleeps through a signal that comes just before the system call.
        while True:
            time.sleep(0.1)
    except KeyboardInterrupt:
        time.sleep(1)
        Path(folder, f"saved-{rank}").touch()
        raise


if __name__ == "__main__":
    how, folder, *rest = sys.argv[1:]
    devices = os.environ.get("DEVICES", "auto")
    if rest == ["again"]:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if rest and rest != ["again"]:
        fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp", launcher=rest[0])
        print("returned", fabric.launch(end, how, folder))
    else:
        fabric = Fabric(accelerator="cpu", devices=devices)
        fabric.launch()
        end(fabric, how, folder)
