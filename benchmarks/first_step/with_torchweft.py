"""One DDP step with torchweft; rank 0 writes when it was done.

Arguments: the file to write, and the number of processes where the script makes them itself.
"""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from torchweft import Fabric


def main():
    devices = {"devices": int(sys.argv[2])} if len(sys.argv) > 2 else {}
    fabric = Fabric(accelerator="cpu", strategy="ddp", **devices)
    fabric.launch()
    model = nn.Linear(32, 10)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    loss = model(torch.randn(16, 32)).sum()
    fabric.backward(loss)
    optimizer.step()
    if fabric.is_global_zero:
        Path(sys.argv[1]).write_text(repr(time.time()))


if __name__ == "__main__":
    main()
