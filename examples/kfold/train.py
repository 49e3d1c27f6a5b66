"""Estimate a classifier's accuracy on handwritten digits by k-fold cross-validation."""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from torchweft import Fabric


def build_model():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 10),
    )


def train(fabric, dataset, args):
    """Train a new model on the dataset; return it and the last epoch's mean loss."""
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    model, optimizer = fabric.setup(model, optimizer)
    dataloader = fabric.setup_dataloaders(
        DataLoader(dataset, batch_size=args.batch_size, shuffle=True)
    )
    model.train()
    for _ in range(args.epochs):
        total = torch.zeros((), device=fabric.device)
        for input, target in dataloader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(input), target)
            fabric.backward(loss)
            optimizer.step()
            total += loss.detach()
    return model, fabric.all_reduce(total / len(dataloader)).item()


@torch.no_grad()
def accuracy(fabric, model, dataset):
    # Each process takes every n-th image itself, so that no image is counted twice.
    mine = Subset(dataset, range(fabric.global_rank, len(dataset), fabric.world_size))
    dataloader = fabric.setup_dataloaders(
        DataLoader(mine, batch_size=256), use_distributed_sampler=False
    )
    model.eval()
    correct = torch.zeros((), device=fabric.device)
    for input, target in dataloader:
        correct += (model(input).argmax(dim=1) == target).sum()
    return fabric.all_reduce(correct, reduce_op="sum").item() / len(dataset)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices)
    fabric.launch()
    fabric.seed_everything(args.seed)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    dataset = TensorDataset(images, labels)

    # The same seed gives every process the same folds.
    folds = StratifiedKFold(args.folds, shuffle=True, random_state=args.seed)
    scores = []
    for fold, (train_ids, test_ids) in enumerate(folds.split(images, labels), start=1):
        model, loss = train(fabric, Subset(dataset, train_ids), args)
        scores.append(accuracy(fabric, model, Subset(dataset, test_ids)))
        fabric.print(f"fold {fold}/{args.folds}  loss {loss:.4f}  accuracy {scores[-1]:.4f}")

    result = torch.tensor(scores)
    fabric.print(f"accuracy {result.mean():.4f} ± {result.std():.4f}")


if __name__ == "__main__":
    main()
