"""Everything random in one training run. Usage: reproduce.py SEED."""

import hashlib
import random
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchweft import Fabric


class Noisy(Dataset):
    """Augmented in the workers by every generator that there is."""

    def __len__(self):
        return 37

    def __getitem__(self, index):
        noise = torch.randn(8) + random.random()
        return noise + index, index % 3


def main(seed):
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    fabric.launch()
    fabric.seed_everything(seed, workers=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2)
    loader = fabric.setup_dataloaders(loader)
    fabric.seed_everything(seed, per_rank=True)
    seen = hashlib.sha256()
    for _ in range(2):
        for inputs, target in loader:
            seen.update(inputs.numpy().tobytes())
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(inputs), target))
            optimizer.step()
    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.numpy().tobytes())
    shown = [seen.hexdigest()[:16], weights.hexdigest()[:16], torch.rand(1).item()]
    shown = [fabric.broadcast(shown, src=rank) for rank in range(2)]
    if fabric.is_global_zero:
        for rank, values in enumerate(shown):
            print(rank, *values)


if __name__ == "__main__":
    main(int(sys.argv[1]))
