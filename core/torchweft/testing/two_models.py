"""Two models that take turns, as in a GAN: in every rank, and by one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchweft.fabric import Fabric
from torchweft.testing.models import Samples, build, loss_of, optimizer_for
from torchweft.testing.training import SEED

__all__ = ["plain_two", "trains_two"]


def trains_two(fabric: Fabric) -> tuple[list[float], list[float]]:
    """A generator and a discriminator, which take turns: this process's losses of both."""
    told: tuple[list[float], list[float]] = [], []
    first, second = _two()
    maker, maker_optimizer = fabric.setup(first, optimizer_for(first, "momentum"))
    judge, judge_optimizer = fabric.setup(second, optimizer_for(second, "adamw"))
    shard = fabric.strategy.shard
    each = 24 // shard.replicas
    data = Samples(24)
    mine = slice(shard.first * each, (shard.first + shard.count) * each)
    x, y = fabric.to_device((data.x[mine], data.y[mine]))
    for _ in range(4):
        made = maker(x)
        losses = _losses(judge, made, y)
        fabric.backward(losses[0], model=judge)
        judge_optimizer.step()
        judge_optimizer.zero_grad()
        loss = loss_of(made, y) + judge(made).square().mean()
        fabric.backward(loss, model=maker)
        maker_optimizer.step()
        maker_optimizer.zero_grad()
        judge_optimizer.zero_grad()
        told[0].append(losses[0].item())
        told[1].append(loss.item())
    return told


def plain_two() -> tuple[list[float], list[float]]:
    """The same by one process, in float64."""
    told: tuple[list[float], list[float]] = [], []
    maker, judge = (model.double() for model in _two())
    maker_optimizer, judge_optimizer = (
        optimizer_for(maker, "momentum"),
        optimizer_for(judge, "adamw"),
    )
    data = Samples(24)
    x, y = data.x.double(), data.y.double()
    for _ in range(4):
        made = maker(x)
        losses = _losses(judge, made, y)
        losses[0].backward()
        judge_optimizer.step()
        judge_optimizer.zero_grad()
        loss = loss_of(made, y) + judge(made).square().mean()
        loss.backward()
        maker_optimizer.step()
        maker_optimizer.zero_grad()
        judge_optimizer.zero_grad()
        told[0].append(losses[0].item())
        told[1].append(loss.item())
    return told


def _two() -> tuple[Any, Any]:
    maker = build("plain", SEED)
    torch.manual_seed(SEED + 1)
    return maker, nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def _losses(judge: Any, made: Any, y: Any) -> list[Any]:
    """The judge's loss on what is real and what was made, in one forward pass."""
    n = len(y)
    judged = judge(torch.cat([y, made.detach().to(y.dtype)]))
    return [(judged[:n] - 1).square().mean() + judged[n:].square().mean()]
