"""Rank 1 is killed until the last attempt. Usage: restarts.py LAST."""

import os
import signal
import sys

import torch

from torchweft import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp")
fabric.launch()
model = fabric.setup(torch.nn.Linear(2, 2))
fabric.backward(model(torch.ones(1, 2)).sum())
fabric.barrier()
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt < int(sys.argv[1]):
    if fabric.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fabric.barrier()
os.write(1, f"attempt {attempt} rank {fabric.global_rank} of {fabric.world_size}\n".encode())
