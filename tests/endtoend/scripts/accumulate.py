"""Trains with micro-batches in 64-bit, and saves what came out and how often ranks communicated.

Usage: accumulate.py PATH ROWS. Each rank has micro-batches of two samples, in groups of four.
"""

import os
import sys

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset

from torchweft import Fabric
from torchweft_cuda.ddp import DDPStrategy


def model_and_data(rows):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = torch.randn(rows, 6, dtype=torch.float64)
    return model, x, torch.randn(rows, 3, dtype=torch.float64)


def main(path, rows):
    reduced = []

    def counted(state, bucket):
        reduced.append(index)
        return allreduce_hook(state, bucket)

    ranks = int(os.environ["DEVICES"])
    strategy = DDPStrategy(ddp_comm_hook=counted) if ranks > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy, precision="64-true")
    fabric.launch()
    model, x, y = model_and_data(rows)
    other, _, _ = model_and_data(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    its_optimizer = torch.optim.AdamW(other.parameters(), lr=0.05)
    model, optimizer = fabric.setup(model, optimizer)
    other, its_optimizer = fabric.setup(other, its_optimizer)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, y), batch_size=2))
    stepped = []
    for _ in range(3):
        for index, (inputs, targets) in enumerate(loader):
            with fabric.accumulate(
                [model, other], steps=4, index=index, total=loader, scale_loss=True
            ) as acc:
                for each in (model, other):
                    fabric.backward(nn.functional.mse_loss(each(inputs), targets))
            if acc.should_step:
                stepped.append(index)
                for each in (optimizer, its_optimizer):
                    each.step()
                    each.zero_grad()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert all(torch.equal(p, fabric.broadcast(p.detach().clone())) for p in model.parameters())
    fabric.save(path, {"model": model, "reduced": reduced, "stepped": stepped})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
