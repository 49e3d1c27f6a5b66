"""Ranks that meet and end. Usage: meet.py HOW FOLDER; HOW is well, fail or wait.

Every rank says where it met the others, and which ports of that number anybody listens on.
"""

import os
import sys
import time
from pathlib import Path

import torch

from torchweft import Fabric


def main(how, folder):
    fabric = Fabric(accelerator="cpu", strategy="ddp")
    fabric.launch()
    place = fabric.strategy.place
    total = fabric.all_reduce(torch.tensor(fabric.global_rank + 1.0), reduce_op="sum")
    meeting = place.rendezvous
    say(fabric, f"{meeting.address} {meeting.port} {listeners(meeting.port)} sum {total:g}")
    if how == "fail":
        if fabric.global_rank == fabric.world_size - 1:
            raise ValueError("the last rank has had enough")
        while True:
            fabric.barrier()
    if how == "wait":
        name = f"{fabric.global_rank}-{place.rank.restart}"
        step = 0
        while not fabric.should_stop:
            Path(folder, f"ready-{name}").touch()
            time.sleep(0.01)
            step += 1
        part = Path(folder, f"part-{name}")
        part.write_text(str(step))
        part.rename(Path(folder, f"stopped-{name}"))


def say(fabric, words):
    os.write(1, f"rank {fabric.global_rank} of {fabric.world_size}: {words}\n".encode())


def listeners(port):
    """The addresses that ``/proc`` gives for sockets that listen on a port."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                found.add(local.partition(":")[0])
    return sorted(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
