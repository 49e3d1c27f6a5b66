"""Callbacks for the trainer: plain classes with the methods that they need."""


class Progress:
    """Prints what happens."""

    def on_fit_start(self, trainer):
        if trainer.epoch:
            trainer.fabric.print(f"going on after epoch {trainer.epoch}, step {trainer.step}")

    def on_epoch_end(self, trainer, metrics):
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        trainer.fabric.print(f"epoch {trainer.epoch:2}  step {trainer.step:4}  {numbers}")


class KeepBest:
    """Writes a checkpoint whenever a metric is higher than ever before."""

    def __init__(self, metric, name="best.ckpt"):
        self.metric = metric
        self.name = name
        self.best = float("-inf")

    def on_epoch_end(self, trainer, metrics):
        if metrics[self.metric] > self.best:
            self.best = metrics[self.metric]
            trainer.save(self.name)

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state):
        self.best = state["best"]


class EarlyStopping:
    """Ends the training when a metric was not lower than ever before for some epochs."""

    def __init__(self, metric, patience):
        self.metric = metric
        self.patience = patience
        self.best = float("inf")
        self.waited = 0

    def on_epoch_end(self, trainer, metrics):
        if metrics[self.metric] < self.best:
            self.best = metrics[self.metric]
            self.waited = 0
        else:
            self.waited += 1
        if self.waited >= self.patience:
            trainer.fabric.print(f"no better {self.metric} for {self.waited} epochs")
            trainer.should_stop = True

    def state_dict(self):
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state):
        self.best = state["best"]
        self.waited = state["waited"]
