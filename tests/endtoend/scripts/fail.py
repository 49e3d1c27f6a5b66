"""Rank 1 ends as told; rank 0 sleeps for ever. Usage: fail.py WAY FOLDER [LAUNCHER]."""

import os
import signal
import sys
import time
from pathlib import Path

from torchweft import Fabric


def end(fabric, way, folder):
    fabric.barrier()
    Path(folder, f"pid-{fabric.global_rank}").write_text(str(os.getpid()))
    if fabric.global_rank == 0:
        time.sleep(600)
    while not Path(folder, "pid-0").exists():
        time.sleep(0.01)
    Path(folder, "time").write_text(str(time.time()))
    if way == "raise":
        raise ValueError("rank one has had enough")
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "exit":
        sys.exit(3)
    if way == "os._exit":
        os._exit(4)


if __name__ == "__main__":
    way, folder = sys.argv[1:3]
    devices = os.environ.get("DEVICES", "auto")
    if len(sys.argv) > 3:
        fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp", launcher=sys.argv[3])
        fabric.launch(end, way, folder)
    else:
        fabric = Fabric(accelerator="cpu", devices=devices)
        fabric.launch()
        end(fabric, way, folder)
