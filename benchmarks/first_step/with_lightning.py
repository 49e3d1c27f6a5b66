"""One DDP step with Lightning Fabric; rank 0 writes when it was done.

Arguments: the file to write, and the number of processes where the script makes them itself.
"""

import os
import sys

import torch
from held import done
from lightning.fabric import Fabric
from torch import nn


def main():
    devices = {"devices": int(sys.argv[2])} if len(sys.argv) > 2 else {}
    fabric = Fabric(accelerator="cpu", strategy="ddp", **devices)
    if devices:  # fabric run has launched already, and refuses to do so twice
        fabric.launch()
    model = nn.Linear(32, 10)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    loss = model(torch.randn(16, 32)).sum()
    fabric.backward(loss)
    optimizer.step()
    done(sys.argv[1], fabric.is_global_zero)
    fabric.barrier()
    # What follows is not timed, and the destructors of the group abort now and then.
    os._exit(0)


if __name__ == "__main__":
    main()
