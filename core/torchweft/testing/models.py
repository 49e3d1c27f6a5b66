"""Small models, each with one trait that a strategy can get wrong, and the data for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

__all__ = ["MODELS", "OPTIMIZERS", "Samples", "build", "loss_of", "optimizer_for"]

#: Features and targets of a sample.
INPUTS, OUTPUTS = 6, 3


class Plain(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, 8)
        self.second = nn.Linear(8, OUTPUTS)

    def forward(self, x: Tensor, branch: int = 0) -> Tensor:
        """Shape ``(batch, 6)`` to ``(batch, 3)``; ``branch`` matters to one model alone."""
        output: Tensor = self.second(torch.tanh(self.first(x)))
        return output


class Frozen(Plain):
    """A first layer that does not train, though the optimizer holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class Shared(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(INPUTS, INPUTS)
        self.down = nn.Linear(INPUTS, INPUTS)
        self.down.weight = self.up.weight
        self.out = nn.Linear(INPUTS, OUTPUTS)

    def forward(self, x: Tensor, branch: int = 0) -> Tensor:
        """Shape ``(batch, 6)`` to ``(batch, 3)``."""
        output: Tensor = self.out(self.down(torch.tanh(self.up(x))))
        return output


class Twice(nn.Module):
    """A layer that takes part in a forward pass twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(INPUTS, INPUTS)
        self.out = nn.Linear(INPUTS, OUTPUTS)

    def forward(self, x: Tensor, branch: int = 0) -> Tensor:
        """Shape ``(batch, 6)`` to ``(batch, 3)``."""
        output: Tensor = self.out(self.again(torch.tanh(self.again(x))))
        return output


class Unused(nn.Module):
    """Layers of which a process uses one, by its rank, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, 8)
        self.branches = nn.ModuleList([nn.Linear(8, OUTPUTS), nn.Linear(8, OUTPUTS)])
        self.never = nn.Linear(8, OUTPUTS)

    def forward(self, x: Tensor, branch: int = 0) -> Tensor:
        """Shape ``(batch, 6)`` to ``(batch, 3)``, by the branch of that number."""
        output: Tensor = self.branches[branch % 2](torch.tanh(self.first(x)))
        return output


class Buffers(nn.Module):
    """Running statistics, and a constant that is drawn when the model is made."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # A bias in front of the normalisation would have no gradient but rounding errors.
        self.first = nn.Linear(INPUTS, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, OUTPUTS)
        self.register_buffer("scale", 1 + torch.rand(8))

    def forward(self, x: Tensor, branch: int = 0) -> Tensor:
        """Shape ``(batch, 6)`` to ``(batch, 3)``."""
        output: Tensor = self.second(self.norm(self.first(x)) * self.scale)
        return output


class Method(Plain):
    """Trained by a method other than ``forward`` that runs its parts."""

    def training_step(self, x: Tensor, branch: int = 0) -> Tensor:
        """Shape ``(batch, 6)`` to ``(batch, 3)``."""
        output: Tensor = self.second(torch.tanh(self.first(x)))
        return output


MODELS: Mapping[str, type[nn.Module]] = {
    "plain": Plain,
    "frozen": Frozen,
    "shared": Shared,
    "twice": Twice,
    "unused": Unused,
    "buffers": Buffers,
    "method": Method,
}


def build(name: str, seed: int) -> Any:
    """A model of that name; the same parameters for the same seed."""
    torch.manual_seed(seed)
    return MODELS[name]()


OPTIMIZERS: Mapping[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}


def optimizer_for(model: nn.Module, name: str, groups: bool = False) -> Optimizer:
    """An optimizer of all parameters; with ``groups`` biases have a rate and a decay of their own.

    A small epsilon would make of rounding errors in tiny gradients whole steps, so that Adam's is
    larger than torch's own.
    """
    if not groups:
        parameters: Any = list(model.parameters())
    else:
        named = dict(model.named_parameters())
        parameters = [
            {"params": [p for n, p in named.items() if not n.endswith("bias")]},
            {
                "params": [p for n, p in named.items() if n.endswith("bias")],
                "lr": 0.2 if name == "sgd" else 0.02,
                "weight_decay": 0.0,
            },
        ]
    optimizer = OPTIMIZERS[name](parameters)
    for group in optimizer.param_groups:
        if "eps" in group:
            group["eps"] = 1e-4
    return optimizer


class Samples(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """``size`` samples ``(index, x, y)``: a number, and float32 of shapes ``(6,)`` and ``(3,)``."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.x = torch.randn(size, INPUTS, generator=generator)
        weight = torch.randn(INPUTS, OUTPUTS, generator=generator)
        self.y = torch.sin(self.x @ weight) + 0.5

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tensor(index), self.x[index], self.y[index]

    def batches(self, size: int) -> Iterator[range]:
        """Indices of batch after batch, for ever."""
        for i in itertools.count():
            first = i * size % len(self)
            yield range(first, min(first + size, len(self)))


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """The mean squared error, in the targets' dtype."""
    return (output.to(y.dtype) - y).square().mean()
