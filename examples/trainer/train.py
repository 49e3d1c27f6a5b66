"""Train a classifier of handwritten digits with a trainer of one's own, and go on later."""

import argparse
import json
from pathlib import Path

import torch
from callbacks import EarlyStopping, KeepBest, Progress
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from trainer import Trainer

from torchweft import Fabric


class JSONLines:
    """A logger is anything with ``log_metrics``; this one appends lines of JSON to a file."""

    def __init__(self, path):
        self.path = path

    def log_metrics(self, metrics, step=None):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def accuracy(output, target):
    return (output.argmax(dim=1) == target).float().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--epochs", type=int, default=20, help="in all, with those before")
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--patience", type=int, default=4, help="epochs without a better loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/trainer"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    fabric = Fabric(
        accelerator=args.accelerator,
        devices=args.devices,
        callbacks=[Progress(), KeepBest("accuracy"), EarlyStopping("loss", args.patience)],
        loggers=JSONLines(args.folder / "metrics.jsonl"),
    )
    fabric.launch()
    fabric.seed_everything(args.seed)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(args.seed)
    train, validation, test = random_split(
        TensorDataset(images, labels), [0.7, 0.15, 0.15], generator=generator
    )

    model = nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 4 * 4, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    trainer = Trainer(
        fabric,
        model,
        optimizer,
        nn.functional.cross_entropy,
        metrics={"accuracy": accuracy},
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95),
        folder=args.folder,
        max_norm=1.0,
        seed=args.seed,
    )
    if args.resume:
        trainer.resume()
    trainer.fit(
        DataLoader(train, batch_size=args.batch_size, shuffle=True),
        DataLoader(validation, batch_size=256),
        epochs=args.epochs,
    )

    trainer.resume("best.ckpt")
    result = trainer.validate(DataLoader(test, batch_size=256))
    fabric.print(f"test accuracy {result['accuracy']:.4f}, with the model of epoch {trainer.epoch}")


if __name__ == "__main__":
    main()
