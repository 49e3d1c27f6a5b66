"""A run that goes on by itself after a process or a computer is lost.

Every attempt begins at the newest checkpoint; nodes may come and go between attempts. See README.md
beside this file for how it is started.
"""

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchweft import Fabric


def digits(count: int = 2048) -> TensorDataset:
    """Points of ten clouds, the same in every process."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(10, 16, generator=generator) * 2
    labels = torch.randint(10, (count,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(count, 16, generator=generator), labels)


def forever(loader: Iterable) -> Iterator:
    """Its batches, epoch after epoch."""
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("elastic"), help="of checkpoints")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=20, help="steps")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds in each step")
    options = parser.parse_args()

    fabric = Fabric(accelerator="cpu", strategy="ddp")
    fabric.launch()
    fabric.seed_everything(1)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
    loader = fabric.setup_dataloaders(DataLoader(digits(), batch_size=32, shuffle=True))

    newest = options.folder / "newest.ckpt"
    step = 0
    if newest.exists():
        step = fabric.load(newest, {"model": model, "optimizer": optimizer})["step"]
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    fabric.print(f"begins at step {step} with {fabric.world_size} processes, restart {restarts}")

    for x, y in forever(loader):
        # Asked once in every step: all processes leave at the same one.
        if fabric.should_stop or step >= options.steps:
            break
        loss = nn.functional.cross_entropy(model(x), y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        time.sleep(options.pause)
        if step % options.save_every == 0:
            # It appears whole or not at all, whenever a process is killed.
            fabric.save(newest, {"model": model, "optimizer": optimizer, "step": step})
    fabric.save(newest, {"model": model, "optimizer": optimizer, "step": step})
    fabric.print(f"ends at step {step} with {fabric.world_size} processes")


if __name__ == "__main__":
    main()
