"""Goes through a loader that has a state on two ranks, is interrupted, and goes on.

Usage: resume.py FOLDER WHEN WORKERS. WHEN is "before": saves in the middle of the second epoch and
notes what would have come; or "after": loads and notes what comes.
"""

import sys
import warnings

import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from torchweft import Fabric

# torchdata calls a function of torch's that torch has deprecated.
warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)


def main(folder, when, workers):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    loader, plain = fabric.setup_dataloaders(
        StatefulDataLoader(range(23), batch_size=2, shuffle=True, num_workers=workers),
        DataLoader(range(23), batch_size=2, shuffle=True),
    )
    path = f"{folder}/loader.ckpt"
    if when == "before":
        first = [[batch.tolist() for batch in each] for each in (loader, plain)]
        batches = iter(loader)
        done = [next(batches).tolist() for _ in range(2)]
        fabric.save(path, {"loader": loader, "epoch": 1})
        noted = {"first": first, "done": done}
    else:
        rest = fabric.load(path, {"loader": loader})
        # A plain loader has no state: the epoch is told to it.
        plain.set_epoch(rest["epoch"])
        batches, noted = loader, {}
    noted["rest"] = [batch.tolist() for batch in batches]
    noted["next"] = [[batch.tolist() for batch in each] for each in (loader, plain)]
    torch.save(noted, f"{folder}/{when}-{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
