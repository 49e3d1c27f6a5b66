"""Trains and validates for many epochs. Usage: epochs.py FOLDER [LAUNCHER]."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchweft import Fabric


def train(fabric, folder):
    model = nn.Linear(2, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = TensorDataset(torch.ones(40, 2), torch.zeros(40, 1))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2, num_workers=1))
    held_out = fabric.setup_dataloaders(DataLoader(data, batch_size=4))
    # For after the last epoch, which a dry run does not reach.
    fabric.setup_dataloaders(DataLoader(data))
    for epoch in range(100):
        for inputs, target in loader:
            optimizer.zero_grad()
            fabric.backward(nn.functional.mse_loss(model(inputs), target))
            optimizer.step()
            fabric.print("step", epoch, flush=True)
        with torch.no_grad():
            for inputs, _ in held_out:
                model(inputs)
                fabric.print("validated", epoch, len(held_out), flush=True)
        fabric.save(Path(folder, "last.ckpt"), {"model": model, "epoch": epoch})


if __name__ == "__main__":
    folder, *launcher = sys.argv[1:]
    if launcher:
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", launcher=launcher[0])
        fabric.launch(train, folder)
    else:
        fabric = Fabric(accelerator="cpu")
        fabric.launch()
        train(fabric, folder)
