"""One DDP step in plain PyTorch; rank 0 writes when it was done. Argument: the file to write."""

import os
import sys

import torch
import torch.distributed as dist
from held import done
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main():
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model(torch.randn(16, 32)).sum()
    loss.backward()
    optimizer.step()
    done(sys.argv[1], dist.get_rank() == 0)
    dist.barrier()
    # What follows is not timed, and the destructors of the group abort now and then.
    os._exit(0)


if __name__ == "__main__":
    main()
