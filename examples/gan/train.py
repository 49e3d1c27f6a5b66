"""Train a generative adversarial network to draw handwritten digits."""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchweft import Fabric

NOISE = 32


def build_generator():
    return nn.Sequential(
        nn.Linear(NOISE, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 64),
        nn.Tanh(),
    )


def build_discriminator():
    return nn.Sequential(
        nn.Linear(64, 256),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(256, 128),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(128, 1),
    )


def frechet_distance(real, fake):
    """Distance between the normal distributions fitted to two sets of images, (n, 64) each."""
    real, fake = real.double(), fake.double()
    real_cov, fake_cov = real.T.cov(), fake.T.cov()
    # The trace of a product's square root is the sum of its eigenvalues' square roots.
    root = torch.linalg.eigvals(real_cov @ fake_cov).real.clamp(min=0).sqrt().sum()
    means = (real.mean(dim=0) - fake.mean(dim=0)).square().sum()
    return (means + real_cov.trace() + fake_cov.trace() - 2 * root).item()


def draw(images, shades=" .:-=+*#%@"):
    """Images of 8 by 8 pixels in [-1, 1], side by side, in characters."""
    levels = ((images + 1) / 2 * (len(shades) - 1)).round().int().view(-1, 8, 8)
    for row in range(8):
        yield "  ".join("".join(shades[level] * 2 for level in image[row]) for image in levels)


@torch.no_grad()
def sample(fabric, generator, count):
    generator.eval()
    return generator(torch.randn(count, NOISE, device=fabric.device)).cpu()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/gan.ckpt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices)
    fabric.launch()
    fabric.seed_everything(args.seed)

    images = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    dataloader = DataLoader(
        TensorDataset(images), batch_size=args.batch_size, shuffle=True, drop_last=True
    )
    dataloader = fabric.setup_dataloaders(dataloader)

    generator, discriminator = build_generator(), build_discriminator()
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=args.lr, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=args.lr, betas=(0.5, 0.999))
    generator, optimizer_g = fabric.setup(generator, optimizer_g)
    discriminator, optimizer_d = fabric.setup(discriminator, optimizer_d)

    state = {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": optimizer_g,
        "optimizer_d": optimizer_d,
        "epoch": 0,
    }
    if args.resume:
        fabric.load(args.checkpoint, state)
        dataloader.set_epoch(state["epoch"])
        fabric.print(f"resumed after epoch {state['epoch']}")

    # From here on every process draws noise of its own.
    torch.manual_seed(args.seed + 1000 * state["epoch"] + fabric.global_rank)
    distance = frechet_distance(images, sample(fabric, generator, len(images)))
    fabric.print(f"distance to the real images {distance:.2f}")

    bce = nn.functional.binary_cross_entropy_with_logits
    while state["epoch"] < args.epochs:
        generator.train()
        totals = torch.zeros(2, device=fabric.device)
        for (real,) in dataloader:
            ones = torch.ones(len(real), 1, device=fabric.device)
            zeros = torch.zeros_like(ones)
            fake = generator(torch.randn(len(real), NOISE, device=fabric.device))

            optimizer_d.zero_grad()
            # Both halves in one call: a model has one forward for each backward.
            logits_real, logits_fake = discriminator(torch.cat([real, fake.detach()])).chunk(2)
            loss_d = bce(logits_real, ones) + bce(logits_fake, zeros)
            fabric.backward(loss_d)
            optimizer_d.step()

            optimizer_g.zero_grad()
            # The discriminator's own gradients are thrown away here; they need not travel.
            with fabric.no_backward_sync(discriminator):
                loss_g = bce(discriminator(fake), ones)
                fabric.backward(loss_g)
            optimizer_g.step()
            totals += torch.stack([loss_d.detach(), loss_g.detach()])

        state["epoch"] += 1
        if state["epoch"] % 5 == 0:
            mean_d, mean_g = (fabric.all_reduce(totals) / len(dataloader)).tolist()
            fabric.print(
                f"epoch {state['epoch']:2}/{args.epochs}  "
                f"discriminator {mean_d:.4f}  generator {mean_g:.4f}"
            )

    fabric.save(args.checkpoint, state)
    made = sample(fabric, generator, len(images))
    fabric.print(f"distance to the real images {frechet_distance(images, made):.2f}")
    fabric.print("\n".join(draw(made[:5])))


if __name__ == "__main__":
    main()
