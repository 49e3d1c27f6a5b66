"""What ranks do in tests of MPI. Usage: ranks.py HOW [FOLDER]."""

import sys
import time
from pathlib import Path

import torch

from torchweft import Fabric

if __name__ == "__main__":
    how, *rest = sys.argv[1:]
    fabric = Fabric(accelerator="cpu", strategy="ddp")
    fabric.launch()
    if how == "fail":
        if fabric.global_rank == 1:
            raise ValueError("rank one has had enough")
        fabric.barrier()  # in which this rank loses the other
        fabric.barrier()
    if how == "sleep":
        if fabric.global_rank == 1:
            raise ValueError("rank one has had enough")
        time.sleep(600)
    if how == "meet":
        rank = fabric.strategy.place.rank
        total = fabric.all_reduce(torch.tensor(rank.rank + 1.0), reduce_op="sum").item()
        where = fabric.strategy.place.rendezvous
        said = f"{rank.run_id} {where.address} {where.port} {rank.node_rank} {rank.local_rank}"
        Path(rest[0], str(rank.rank)).write_text(f"{total:g} {said}")
        # Both jobs of a test are there at once.
        while len(list(Path(rest[0]).parent.glob("*/[0-9]"))) < int(rest[1]):
            time.sleep(0.02)
        fabric.barrier()
