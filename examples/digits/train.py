"""Train a small convolutional network on handwritten digits."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from torchweft import Fabric


def main():
    epochs = 15
    fabric = Fabric()
    fabric.launch()
    fabric.print(fabric.plan.explain())

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    train, test = random_split(TensorDataset(images, labels), [0.8, 0.2], generator=generator)
    dataloader = DataLoader(train, batch_size=32, shuffle=True)
    test_dataloader = DataLoader(test, batch_size=120)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * 4 * 4, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer = fabric.setup(model, optimizer)
    dataloader = fabric.setup_dataloaders(dataloader)
    test_dataloader = fabric.setup_dataloaders(test_dataloader, use_distributed_sampler=False)

    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for step, (input, target) in enumerate(dataloader, start=1):
            loss = nn.functional.cross_entropy(model(input), target)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
            if sys.stdout.isatty():
                fabric.print(f"epoch {epoch:2}/{epochs}  step {step:2}/{len(dataloader)}", end="\r")
        mean = fabric.all_reduce(total / len(dataloader))
        fabric.print(f"epoch {epoch:2}/{epochs}  loss {mean:.4f}")

    model.eval()
    correct = 0
    with torch.no_grad():
        for input, target in test_dataloader:
            correct += (model(input).argmax(dim=1) == target).sum().item()
    fabric.print(f"test accuracy {correct / len(test):.4f}")


if __name__ == "__main__":
    main()
