"""Train a small convolutional network on handwritten digits."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


def main():
    epochs = 15
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for step, (input, target) in enumerate(dataloader, start=1):
            input, target = input.to(device), target.to(device)
            loss = nn.functional.cross_entropy(model(input), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
            if sys.stdout.isatty():
                print(f"epoch {epoch:2}/{epochs}  step {step:2}/{len(dataloader)}", end="\r")
        mean = total / len(dataloader)
        print(f"epoch {epoch:2}/{epochs}  loss {mean:.4f}")

    model.eval()
    correct = 0
    with torch.no_grad():
        for input, target in test_dataloader:
            input, target = input.to(device), target.to(device)
            correct += (model(input).argmax(dim=1) == target).sum().item()
    print(f"test accuracy {correct / len(test):.4f}")


if __name__ == "__main__":
    main()
