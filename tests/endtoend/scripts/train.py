"""Trains a small model in 64-bit on global batches of eight and saves what came out.

Usage: train.py PATH [HOW]. HOW is "script" (fabric.launch()), or the launcher of launch(function).
"""

import os
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchweft import Fabric


def train(fabric, path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    x = torch.randn(64, 6, dtype=torch.float64)
    y = torch.randn(64, 3, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, y), batch_size=8 // fabric.world_size)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            fabric.backward(loss)
            optimizer.step()
    fabric.save(path, {"model": model, "optimizer": optimizer, "ranks": fabric.world_size})
    return {name: value.clone() for name, value in model.state_dict().items()}


if __name__ == "__main__":
    path, how = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "script"
    devices = os.environ.get("DEVICES", "auto")
    common = {"accelerator": "cpu", "devices": devices, "precision": "64-true"}
    if how == "script":
        fabric = Fabric(**common)
        fabric.launch()
        train(fabric, path)
    else:
        fabric = Fabric(**common, strategy="ddp", launcher=how)
        returned = fabric.launch(train, path)
        saved = torch.load(path, weights_only=True)["model"]
        assert all(torch.equal(returned[name], saved[name]) for name in saved)
