"""Ranks that are looked into. Usage: look.py FOLDER."""

import sys
import time
from pathlib import Path

import torch

from torchweft import Fabric


def main(folder):
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    fabric.launch()
    held = torch.zeros(1 + fabric.global_rank, 5_000_000)
    memory = fabric.memory()
    answer = 40 + fabric.global_rank
    fabric.breakpoint()
    Path(folder, f"went-on-{fabric.global_rank}").write_text(str(time.time()))
    answer += int(fabric.all_reduce(1, reduce_op="sum"))
    if fabric.global_rank == 0:
        # What rank 1 read at the same time is the same.
        print("answer", answer)
        print("memory", len(memory), memory[1]["host"] - memory[0]["host"] > 10_000_000)
        print("peak", all(0 < it["host"] <= it["host_peak"] for it in memory))
    del held


if __name__ == "__main__":
    main(sys.argv[1])
