"""A small trainer: the loop of ``train.py`` made once, for any model, on top of Fabric."""

from pathlib import Path

import torch


class Trainer:
    """Fits a model, validates it after every epoch, and writes a checkpoint to go on from.

    The Fabric's callbacks may have these methods, which are called in every process:
    ``on_fit_start(trainer)``, ``on_epoch_end(trainer, metrics)`` and ``on_fit_end(trainer)``. One
    that has ``state_dict`` and ``load_state_dict`` is kept in the checkpoint too. The Fabric's
    loggers get the training loss every ``log_every`` steps and the metrics of every epoch.

    Args:
        fabric: a Fabric that was launched.
        model: any module.
        optimizer: of the model's parameters.
        loss: ``loss(output, target)``, a tensor with one number.
        metrics: by name, ``metric(output, target)``, the mean over a batch.
        scheduler: of the learning rate; it steps once an epoch.
        folder: where checkpoints go.
        max_norm: of the gradients, or None.
        log_every: steps.
        seed: of dropout and the like, together with the epoch.
    """

    def __init__(
        self,
        fabric,
        model,
        optimizer,
        loss,
        *,
        metrics=None,
        scheduler=None,
        folder="runs",
        max_norm=None,
        log_every=10,
        seed=0,
    ):
        self.fabric = fabric
        self.model, self.optimizer, *rest = fabric.setup(model, optimizer, scheduler=scheduler)
        self.scheduler = rest[0] if rest else None
        self.loss = loss
        self.metrics = {"loss": loss, **(metrics or {})}
        self.folder = Path(folder)
        self.max_norm = max_norm
        self.log_every = log_every
        self.seed = seed
        self.should_stop = False
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "epoch": 0,
            "step": 0,
            "callbacks": {
                type(callback).__name__: callback
                for callback in fabric.callbacks
                if hasattr(callback, "state_dict")
            },
        }
        if self.scheduler is not None:
            self.state["scheduler"] = self.scheduler

    @property
    def epoch(self):
        """Epochs that are done."""
        return self.state["epoch"]

    @property
    def step(self):
        """Steps that are done, in all epochs."""
        return self.state["step"]

    def save(self, name):
        """Write everything that is needed to go on; call it in every process."""
        self.fabric.save(self.folder / name, self.state)

    def resume(self, name="last.ckpt"):
        """Go on from a checkpoint: the next ``fit`` begins with the epoch after it."""
        self.fabric.load(self.folder / name, self.state)

    def fit(self, dataloader, validation_dataloader, epochs):
        """Train until ``epochs`` epochs are done in all, or a callback sets ``should_stop``."""
        dataloader = self.fabric.setup_dataloaders(dataloader)
        dataloader.set_epoch(self.epoch)
        validation_dataloader = self.set_up_for_validation(validation_dataloader)
        self.fabric.call("on_fit_start", trainer=self)
        while self.epoch < epochs and not self.should_stop:
            # A run that was resumed draws the numbers that it would have drawn otherwise.
            torch.manual_seed(self.seed + self.epoch)
            self.train_epoch(dataloader)
            metrics = self.evaluate(validation_dataloader)
            self.state["epoch"] += 1
            self.fabric.log_dict({f"validation/{k}": v for k, v in metrics.items()}, self.step)
            self.fabric.call("on_epoch_end", trainer=self, metrics=metrics)
            self.save("last.ckpt")
        self.fabric.call("on_fit_end", trainer=self)

    def validate(self, dataloader):
        """The metrics of a dataset, as numbers by name."""
        return self.evaluate(self.set_up_for_validation(dataloader))

    def set_up_for_validation(self, dataloader):
        # Every process sees all samples. Shared out, they would be rounded up to the same number
        # for each process, and some would count twice.
        return self.fabric.setup_dataloaders(dataloader, use_distributed_sampler=False)

    def train_epoch(self, dataloader):
        self.model.train()
        for input, target in dataloader:
            self.optimizer.zero_grad()
            loss = self.loss(self.model(input), target)
            self.fabric.backward(loss)
            if self.max_norm is not None:
                self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.max_norm)
            self.optimizer.step()
            self.state["step"] += 1
            if self.step % self.log_every == 0:
                mean = self.fabric.all_reduce(loss.detach())
                self.fabric.log("train/loss", mean, self.step)
        if self.scheduler is not None:
            self.scheduler.step()

    @torch.no_grad()
    def evaluate(self, dataloader):
        self.model.eval()
        totals = dict.fromkeys(self.metrics, 0.0)
        count = 0
        for input, target in dataloader:
            output = self.model(input)
            count += len(target)
            for name, metric in self.metrics.items():
                totals[name] += metric(output, target) * len(target)
        return {name: (total / count).item() for name, total in totals.items()}
