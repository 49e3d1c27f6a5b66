"""One DDP step with Accelerate; rank 0 writes when it was done. Argument: the file to write."""

import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn


def main():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(32, 10)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    loss = model(torch.randn(16, 32)).sum()
    accelerator.backward(loss)
    optimizer.step()
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(repr(time.time()))
    accelerator.wait_for_everyone()
    # What follows is not timed, and the destructors of the group abort now and then.
    os._exit(0)


if __name__ == "__main__":
    main()
