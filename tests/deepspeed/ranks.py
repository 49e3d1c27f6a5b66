"""What ranks do in the tests of strategy ``deepspeed``."""

from __future__ import annotations

import ctypes
import gc
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchweft.api import Place
from torchweft.testing.models import Samples, build, loss_of, optimizer_for
from torchweft_deepspeed import library
from torchweft_deepspeed.strategy import DeepSpeedStrategy

STEPS = 50
M_MMAP_THRESHOLD = -3  # of malloc.h


def data_of(fabric: Any) -> tuple[Tensor, Tensor]:
    """This rank's half of the samples."""
    data = Samples(16)
    each = 16 // fabric.world_size
    mine = slice(fabric.global_rank * each, (fabric.global_rank + 1) * each)
    return data.x[mine], data.y[mine]


def set_up(fabric: Any, optimizer: str = "adamw") -> tuple[Any, Any]:
    plain = build("plain", 3)
    return fabric.setup(plain, optimizer_for(plain, optimizer))


def train_long(fabric: Any) -> list[float]:
    """Losses of many steps."""
    model, optimizer = set_up(fabric)
    x, y = data_of(fabric)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model(x), y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(fabric.all_reduce(loss.detach().clone())))
    return losses


def twice(fabric: Any) -> float:
    """Two losses, each with a backward pass of its own, in one step."""
    model, optimizer = set_up(fabric, "momentum")
    x, y = data_of(fabric)
    losses = [loss_of(model(x), y), loss_of(model(x + 1), y)]
    for loss in losses:
        fabric.backward(loss)
    norm = float(fabric.clip_gradients(model, optimizer, max_norm=1e9))
    optimizer.step()
    return norm


def given_up(fabric: Any) -> float:
    """The norm behind gradients that were forgotten, in the middle of a step and at its end."""
    model, optimizer = set_up(fabric, "momentum")
    x, y = data_of(fabric)
    for last in (False, True):
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(100 * loss_of(model(x), y))
        optimizer.zero_grad()
    fabric.backward(loss_of(model(x), y))
    return float(fabric.clip_gradients(model, optimizer, max_norm=1e9))


def steps_in_the_middle(fabric: Any) -> None:
    model, optimizer = set_up(fabric)
    x, y = data_of(fabric)
    with fabric.no_backward_sync(model):
        fabric.backward(loss_of(model(x), y))
    optimizer.step()


def steps_without_gradients(fabric: Any) -> bool:
    model, optimizer = set_up(fabric)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def two_models(fabric: Any, say: bool) -> None:
    """A loss that leads to both, with and without a word whose it is."""
    first, one = set_up(fabric, "sgd")
    second_plain = nn.Linear(3, 1)
    second, two = fabric.setup(second_plain, torch.optim.SGD(second_plain.parameters(), lr=0.1))
    x, _ = data_of(fabric)
    loss = second(first(x)).square().mean()
    if say:
        fabric.backward(loss, model=first)
    else:
        fabric.backward(loss)
    one.step()
    two.step()


def by_graph(fabric: Any) -> list[bool]:
    """Which of two models change by the loss of one."""
    models = [set_up(fabric, "sgd") for _ in range(2)]
    x, y = data_of(fabric)
    before = [_whole(fabric, model) for model, _ in models]
    fabric.backward(loss_of(models[1][0](x), y))
    for _, optimizer in models:
        optimizer.step()
    after = [_whole(fabric, model) for model, _ in models]
    return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def _whole(fabric: Any, model: Any) -> Tensor:
    named = dict(fabric.strategy.module_state(model.prepared))
    flat = [value.flatten() for value in named.values() if not value.is_meta]
    return torch.cat(flat) if flat else torch.zeros(0)


def asks(fabric: Any, what: str) -> None:
    """What is refused."""
    plain = build("plain", 3)
    optimizer = optimizer_for(plain, "sgd")
    if what == "two optimizers":
        fabric.setup(plain, optimizer, optimizer_for(plain, "adamw"))
    elif what == "foreign parameters":
        other = build("plain", 4)
        kept = fabric.setup(other)
        assert kept is not None
        optimizer.add_param_group({"params": list(other.parameters())})
        fabric.setup(plain, optimizer)
    elif what == "nothing trains":
        plain.requires_grad_(False)
        fabric.setup(plain, optimizer)
    else:
        model, ready = fabric.setup(plain, optimizer)
        x, y = data_of(fabric)
        output = model(x)
        if what == "several numbers":
            fabric.backward(output)
        fabric.backward(loss_of(output, y))
        if what == "a closure":
            ready.step(lambda: None)
        elif what == "another norm":
            fabric.clip_gradients(model, ready, max_norm=1.0, norm_type=1.0)
        elif what == "another group":
            ready.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
            ready.step()


def differentiates(fabric: Any) -> float:
    """torch.autograd.grad through a model, which DeepSpeed is not to take for a backward pass."""
    model, optimizer = set_up(fabric, "sgd")
    x, y = data_of(fabric)
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x)
    fabric.backward(loss_of(model(x), y))
    optimizer.step()
    return float(slope.abs().sum())


class Wide(nn.Module):
    """Layers, each of 4 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(24)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def made_wide(fabric: Any, divided: bool) -> int:
    """By how many bytes the most memory that was used grew while a model was made."""
    # What is freed goes back to the system at once, and not into gaps that nothing fits into.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    with fabric.init_module():
        nn.Linear(1024, 1024)  # what is imported on the way
    before = fabric.memory()[fabric.global_rank]["host_peak"]
    if divided:
        with fabric.init_module():
            model = Wide()
    else:
        model = Wide()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (held < 1e6) is divided
    return fabric.memory()[fabric.global_rank]["host_peak"] - before


def saves(fabric: Any, path: Path) -> None:
    """A model with frozen and shared parameters, trained and saved."""
    plain = build("shared", 3)
    plain.out.bias.requires_grad_(False)
    model, optimizer = fabric.setup(plain, optimizer_for(plain, "adamw", groups=True))
    x, y = data_of(fabric)
    for _ in range(2):
        fabric.backward(loss_of(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(path, {"model": model, "optimizer": optimizer})


def loads_other(fabric: Any, path: Path) -> None:
    plain = nn.Linear(6, 5)
    model = fabric.setup(plain, optimizer_for(plain, "sgd"))[0]
    fabric.save(path, {"model": model})
    other = nn.Linear(6, 4)
    ready = fabric.setup(other, optimizer_for(other, "sgd"))[0]
    fabric.load(path, {"model": ready})


def evaluates(fabric: Any) -> float:
    """A model without an optimizer."""
    model = fabric.setup(build("plain", 3 + fabric.global_rank))
    with torch.no_grad():
        return float(model(Samples(4).x).sum())


class AnyNumbers(DeepSpeedStrategy):
    """Float16 on processors that are slow at it, and which DeepSpeed refuses."""

    def start(self, place: Place) -> None:
        library.load(place.device.type)
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
        super().start(place)


def train_scaled(fabric: Any, path: Path) -> list[Any]:
    """Losses and norms, with an overflow on the way, and the state of the scale once more."""
    model, optimizer = set_up(fabric, "momentum")
    x, y = data_of(fabric)
    told: list[Any] = []
    for step in range(4):
        loss = loss_of(model(x), y)
        fabric.backward(loss * (1e8 if step == 2 else 1.0))
        norm = fabric.clip_gradients(model, optimizer, max_norm=0.3)
        optimizer.step()
        optimizer.zero_grad()
        told.append((float(fabric.all_reduce(loss.detach().clone())), float(norm)))
    state = fabric.strategy.extra_state()
    fabric.save(path, {"model": model, "optimizer": optimizer})
    del model, optimizer, loss
    gc.collect()
    again, ready = set_up(fabric, "momentum")
    fabric.load(path, {"model": again, "optimizer": ready})
    assert fabric.strategy.extra_state() == state
    return [*told, state["deepspeed"][0]["cur_scale"], float(loss_of(again(x), y))]


def lets_go(fabric: Any) -> bool:
    """Whether a model that nobody has any more is gone, DeepSpeed's engine included."""
    model, optimizer = set_up(fabric)
    x, y = data_of(fabric)
    fabric.backward(loss_of(model(x), y))
    optimizer.step()
    alive = weakref.ref(model.prepared)
    del model, optimizer
    gc.collect()
    return alive() is None


# -- a drive ---------------------------------------------------------------------------------------


def wide() -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """Layers that are large enough to be worth a way to the drive."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 1024))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4), torch.randn(4, 1024)


def trains_wide(fabric: Any, drive: Path, path: Path | None, load: bool) -> tuple[list[float], int]:
    """Losses, and how many files the drive has. Saves behind two of four steps."""
    plain, made, x = wide()
    model, optimizer = fabric.setup(plain, made)
    state = {"model": model, "optimizer": optimizer}
    if load:
        fabric.load(path, state)
    losses = []
    for step in range(2 if load else 4):
        if path is not None and not load and step == 2:
            fabric.save(path, state)
        loss = model(x).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[-2:], len(list(drive.rglob("*.swp")))
