"""Goes through 9 numbers on two ranks without duplicates, and saves what each rank saw.

Usage: evaluate.py FOLDER HOW. HOW is "drop" or "mask".
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import torchweft
from torchweft import Fabric


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(9))


def go_through(fabric, model, loader, how):
    seen, steps = [], 0
    for batch in loader:
        if how == "mask":
            values, mask = batch
            # As many batches on every rank: ranks may talk to each other in each.
            model(values.unsqueeze(1).float())
            fabric.barrier()
            values = values[mask]
        else:
            values = batch
            model.module(values.unsqueeze(1).float())
        seen += values.tolist()
        steps += 1
    return {"seen": seen, "steps": steps}


def main(folder, how):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    # Buffers, which DistributedDataParallel brings into line in every forward, also in eval().
    model = fabric.setup(nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))).eval()
    loaders = fabric.setup_dataloaders(
        DataLoader(range(9), batch_size=2),
        DataLoader(range(9), batch_size=2, shuffle=True, num_workers=1),
        DataLoader(range(9), batch_sampler=[[0, 1, 2], [3], [4, 5], [6], [7, 8]]),
        DataLoader(torchweft.shard(Numbers()), batch_size=2),
        duplicates=how,
    )
    with torch.no_grad():
        results = [go_through(fabric, model, loader, how) for loader in loaders]
    torch.save(results, f"{folder}/{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
