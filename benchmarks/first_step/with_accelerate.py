"""One DDP step with Accelerate; rank 0 writes when it was done. Argument: the file to write."""

import os
import sys

import torch
from accelerate import Accelerator
from held import done
from torch import nn


def main():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(32, 10)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    loss = model(torch.randn(16, 32)).sum()
    accelerator.backward(loss)
    optimizer.step()
    done(sys.argv[1], accelerator.is_main_process)
    accelerator.wait_for_everyone()
    # What follows is not timed, and the destructors of the group abort now and then.
    os._exit(0)


if __name__ == "__main__":
    main()
