"""Trains a small model in 64-bit on global batches of eight, in two micro-batches each.

Usage: train.py PATH [STRATEGY]. Writes the parameters to PATH; without STRATEGY it is left to
the command that runs the script.
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchweft import Fabric


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 6, dtype=torch.float64, generator=generator)
    y = torch.randn(64, 3, dtype=torch.float64, generator=generator)
    return TensorDataset(x, y)


def main():
    path, *strategy = sys.argv[1:]
    asked = {"strategy": strategy[0], "devices": 2} if strategy else {}
    fabric = Fabric(accelerator="cpu", **asked)
    fabric.launch()
    # Each process its own: what they start from together is the strategy's doing.
    torch.manual_seed(1 + fabric.global_rank)
    model = nn.Sequential(
        nn.Linear(6, 16, dtype=torch.float64),
        nn.Tanh(),
        nn.Linear(16, 3, dtype=torch.float64),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loader = DataLoader(data(), batch_size=4 // fabric.world_size)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)
    for _ in range(2):
        for number, (inputs, targets) in enumerate(loader):
            last = number % 2 == 1
            with fabric.no_backward_sync(model, enabled=not last):
                loss = nn.functional.mse_loss(model(inputs), targets) / 2
                fabric.backward(loss)
            if last:
                fabric.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
                optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(fabric.broadcast(value), value), f"{name} differs between processes"
    fabric.save(path, {"model": model, "ranks": fabric.world_size})
    strategy = fabric.strategy
    fabric.print(f"trained by {type(strategy).__module__}:{type(strategy).__qualname__}")


if __name__ == "__main__":
    main()
