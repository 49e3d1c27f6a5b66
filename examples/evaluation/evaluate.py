"""Test a model on every image exactly once, on any number of processes."""

import torch
import torchmetrics
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from torchweft import Fabric


def main():
    epochs = 5
    fabric = Fabric()
    fabric.launch()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    train, test = random_split(TensorDataset(images, labels), [0.8, 0.2], generator=generator)

    fabric.seed_everything(0, verbose=False)
    model = nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer = fabric.setup(model, optimizer)
    dataloader = fabric.setup_dataloaders(DataLoader(train, batch_size=32, shuffle=True))
    test_dataloader = fabric.setup_dataloaders(DataLoader(test, batch_size=32), duplicates="mask")

    for _ in range(epochs):
        for input, target in dataloader:
            loss = nn.functional.cross_entropy(model(input), target)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    accuracy = torchmetrics.classification.MulticlassAccuracy(10, average="micro")
    accuracy = accuracy.to(fabric.device)
    counted = torchmetrics.SumMetric().to(fabric.device)
    with torch.no_grad():
        for (input, target), mask in test_dataloader:
            prediction = model(input)
            accuracy.update(prediction[mask], target[mask])
            counted.update(mask.sum())
    # compute() brings the numbers of all processes together, so that every process calls it.
    total, value = int(counted.compute()), accuracy.compute().item()
    fabric.print(f"test accuracy {value:.4f} on {total} of {len(test)} images")


if __name__ == "__main__":
    main()
