"""Every rank logs what it has. Usage: log.py FOLDER [function launcher | fail]."""

import sys

import torch
from torch import nn

from torchweft import Fabric
from torchweft.loggers import CSVLogger, TensorBoardLogger


class Notes:
    """A callback that names what it wants to know."""

    def on_epoch_end(self, loss):
        self.loss = loss


def train(fabric, fail=False):
    fabric.logger.log_hyperparams({"lr": 0.1, "world_size": fabric.world_size})
    model = nn.Linear(2, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(5):
        loss = model(torch.ones(4, 2)).pow(2).mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        fabric.log_dict({"loss": loss, "rank": fabric.global_rank}, step=step)
        if step == 3:
            fabric.log("late", step, step=step)
            if fail and fabric.is_global_zero:
                raise ValueError("rank zero has had enough")
    fabric.call("on_epoch_end", loss=loss.item())
    # Directly, and not through Fabric: in every rank too.
    for logger in fabric.loggers:
        logger.log_metrics({"direct": fabric.global_rank}, 5)
    where = [logger.log_dir if fabric.is_global_zero else None for logger in fabric.loggers]
    where = [fabric.broadcast(folder) for folder in where]
    if fabric.global_rank == 1:
        print(*where)


if __name__ == "__main__":
    folder, how = [*sys.argv[1:], ""][:2]
    loggers = [CSVLogger(folder, "csv"), TensorBoardLogger(folder, "tb")]
    launcher = how if how not in ("", "fail") else "auto"
    fabric = Fabric(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        launcher=launcher,
        loggers=loggers,
        callbacks=Notes(),
    )
    if launcher == "auto":
        fabric.launch()
        train(fabric, fail=how == "fail")
    else:
        fabric.launch(train)
