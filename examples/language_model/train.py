"""Train a small GPT, character by character, on the source of Python's standard library."""

import argparse
import itertools
import math
import sysconfig
from pathlib import Path

import torch
from gpt import GPT
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from torchweft import Fabric

VOCABULARY = 128  # ASCII


def read_standard_library():
    """The modules of the standard library, one after the other, as ASCII codes."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(module.read_text("utf-8", errors="replace") for module in modules)
    return torch.frombuffer(bytearray(text.encode("ascii", errors="replace")), dtype=torch.uint8)


class Windows(Dataset):
    """Consecutive pieces of a text, each with the piece that is one character further."""

    def __init__(self, text, length):
        self.text = text
        self.length = length

    def __len__(self):
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index):
        start = index * self.length
        piece = self.text[start : start + self.length + 1].long()
        return piece[:-1], piece[1:]


def cross_entropy(model, batch):
    input, target = batch
    return functional.cross_entropy(model(input).flatten(0, 1), target.flatten())


def learning_rate(step, warmup, steps):
    """The factor of a linear warm-up and a cosine that ends at a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def endless(dataloader):
    while True:
        yield from dataloader


@torch.no_grad()
def validate(fabric, model, dataloader, batches):
    model.eval()
    losses = [cross_entropy(model, batch) for batch in itertools.islice(dataloader, batches)]
    model.train()
    return fabric.all_reduce(torch.stack(losses).mean()).item()


@torch.no_grad()
def generate(fabric, model, prompt, length, temperature=0.8):
    model.eval()
    tokens = torch.tensor([list(prompt.encode("ascii"))], device=fabric.device)
    for _ in range(length):
        logits = model(tokens[:, -model.context :])[:, -1].float() / temperature
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(dim=-1), 1)], dim=1)
    return bytes(tokens[0].tolist()).decode("ascii")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--precision", default="auto", help="for example bf16-mixed")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="per process")
    parser.add_argument("--accumulate", type=int, default=2, help="batches in a step")
    parser.add_argument("--context", type=int, default=128, help="characters")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--sample", type=int, default=400, help="characters to write at the end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices, precision=args.precision)
    fabric.launch()
    fabric.seed_everything(args.seed)

    text = read_standard_library()
    split = int(0.9 * len(text))
    train, validation = Windows(text[:split], args.context), Windows(text[split:], args.context)
    fabric.print(f"{len(text):,} characters, the last {len(text) - split:,} for validation")
    dataloader, validation_dataloader = fabric.setup_dataloaders(
        DataLoader(train, batch_size=args.batch_size, shuffle=True, drop_last=True),
        DataLoader(validation, batch_size=32),
    )

    with fabric.init_module():
        model = GPT(VOCABULARY, args.context, args.width, args.depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, warmup=20, steps=args.steps)
    )
    model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=scheduler)

    batches = endless(dataloader)
    for step in range(1, args.steps + 1):
        total = torch.zeros((), device=fabric.device)
        for micro in range(1, args.accumulate + 1):
            # Gradients travel between processes with the last batch of the step alone.
            with fabric.no_backward_sync(model, enabled=micro < args.accumulate):
                loss = cross_entropy(model, next(batches)) / args.accumulate
                fabric.backward(loss)
            total += loss.detach()
        norm = fabric.clip_gradients(model, optimizer, max_norm=args.max_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == 1 or step % 20 == 0:
            mean = fabric.all_reduce(total)
            fabric.print(f"step {step:4}/{args.steps}  loss {mean:.4f}  gradient norm {norm:.2f}")

    loss = validate(fabric, model, validation_dataloader, batches=20)
    fabric.print(f"validation loss {loss:.4f}")
    # Every process writes the same text, so that no strategy waits for one that does not.
    fabric.seed_everything(args.seed)
    sample = generate(fabric, model, "def ", args.sample)
    fabric.print(sample)


if __name__ == "__main__":
    main()
