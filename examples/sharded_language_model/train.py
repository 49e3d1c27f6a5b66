"""Train a GPT that is split between processes, on the source of Python's standard library."""

import argparse
import sysconfig
from pathlib import Path

import torch
from gpt import GPT
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, Sampler

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


class Steps(Sampler):
    """The samples of each step from ``first`` on, drawn with a seed of its own.

    They depend on the step alone: not on the number of processes, nor on where a run began.
    """

    def __init__(self, samples, batch_size, first, last, seed):
        self.samples = samples
        self.batch_size = batch_size
        self.steps = range(first, last)
        self.seed = seed

    def __len__(self):
        return len(self.steps) * self.batch_size

    def __iter__(self):
        for step in self.steps:
            generator = torch.Generator().manual_seed(1_000_000 * self.seed + step)
            yield from torch.randint(self.samples, (self.batch_size,), generator=generator).tolist()


def held(model):
    """Numbers of the parameters that this process holds."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(part.numel() for part in parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto", help="for example fsdp:policy=Block")
    parser.add_argument("--precision", default="auto", help="for example bf16-mixed")
    parser.add_argument("--steps", type=int, default=100, help="in all, with those before")
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes, in a step")
    parser.add_argument("--accumulate", type=int, default=2, help="parts that a step is made of")
    parser.add_argument("--context", type=int, default=128, help="characters")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--sequence-parallel", action="store_true", help="where layers are divided")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--log-every", type=int, default=10, help="steps")
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/sharded_language_model"))
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    fabric = Fabric(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=args.strategy,
        precision=args.precision,
    )
    fabric.launch()
    fabric.seed_everything(args.seed)

    # Nothing is computed or allocated here: each process fills its part in setup.
    with fabric.init_module():
        model = GPT(
            VOCABULARY,
            args.context,
            args.width,
            args.depth,
            args.heads,
            sequence_parallel=args.sequence_parallel,
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / args.warmup)
    )
    model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=scheduler)
    fabric.print(
        f"{total:,} parameters, of which a process holds {held(model):,}; "
        f"{fabric.world_size} process(es), {fabric.num_replicas} replica(s)"
    )

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    first = 0
    if args.resume is not None:
        first = fabric.load(args.resume, state)["step"]
        fabric.print(f"going on after step {first}")

    # A step sees the same samples whatever the number of replicas: each takes its share of them.
    parts = args.accumulate * fabric.num_replicas
    if args.batch_size % parts:
        raise ValueError(f"--batch-size {args.batch_size} is not divisible into {parts} parts")
    text = Windows(read_standard_library(), args.context)
    steps = Steps(len(text), args.batch_size, first, args.steps, args.seed)
    dataloader = fabric.setup_dataloaders(
        DataLoader(text, batch_size=args.batch_size // parts, sampler=steps)
    )

    step, mean = first, 0.0
    for index, (tokens, following) in enumerate(dataloader):
        with fabric.accumulate(
            model, steps=args.accumulate, index=index, scale_loss=True
        ) as accumulation:
            loss = model(tokens, following)
            fabric.backward(loss)
        mean += loss.detach() / args.accumulate
        if not accumulation.should_step:
            continue
        norm = fabric.clip_gradients(model, optimizer, max_norm=args.max_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step == 1 or step % args.log_every == 0:
            mean = fabric.all_reduce(mean)
            fabric.print(f"step {step:4}/{args.steps}  loss {mean:.4f}  gradient norm {norm:.4f}")
        mean = 0.0
        if step % args.save_every == 0:
            # A folder, to which every process writes its part.
            fabric.save(args.folder / f"step{step}", {**state, "step": step})


if __name__ == "__main__":
    main()
