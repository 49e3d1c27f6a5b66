"""What ranks do in a number format, and the same in plain torch and float64."""

from __future__ import annotations

import math
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from torchweft.api import Autocast
from torchweft.api.initialising import default_dtype
from torchweft.errors import TorchweftError
from torchweft.fabric import Fabric
from torchweft.testing.models import Samples, build

__all__ = [
    "Call",
    "Failed",
    "Item",
    "Pair",
    "Stepped",
    "accumulate",
    "backward_plainly",
    "clip",
    "closure",
    "enter_contexts",
    "evaluate",
    "forget",
    "formats",
    "go_on",
    "inputs",
    "leave_as_found",
    "outputs",
    "overflow",
    "plain_steps",
    "read",
    "returned",
    "save_midway",
    "several",
    "train",
    "unscale",
]

SEED = 3
#: Steps of a training, and samples in each of them, divisible by every number of replicas.
STEPS, BATCH = 8, 24


@dataclass(kw_only=True)
class Stepped:
    """What a rank saw of some steps.

    Attributes:
        losses: this rank's own.
        gradients: the norm of what ``backward`` left in ``.grad``, scaled or not.
        values: the parameters at the end.
        moved: whether each step changed them.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    moved: list[bool] = field(default_factory=list)


def several(fabric: Fabric, calls: Sequence[Call]) -> list[Any]:
    """What functions of this module answer, each with models of its own; a ``Failed`` otherwise."""
    answers: list[Any] = []
    for function, args in calls:
        try:
            answers.append(function(fabric, *args))
        except Exception:
            answers.append(Failed(trace=traceback.format_exc()))
    return answers


Call = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """What a function did in place of an answer."""

    trace: str


# -- the loop --------------------------------------------------------------------------------------


def _set_up(fabric: Fabric, optimizer: str, seed: int = SEED) -> tuple[Any, Any]:
    plain = build("plain", seed)
    ready: tuple[Any, Any] = fabric.setup(plain, _OPTIMIZERS[optimizer](plain.parameters()))
    return ready


#: Adam's averages of squares are forgotten faster than is usual, and its epsilon is larger: parts
#: of a thousand of a small square are nothing any more in 16 bits.
_OPTIMIZERS: Mapping[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1),
    "momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: AdamW(parameters, lr=0.02, betas=(0.9, 0.9), eps=1e-3),
}


def _loss_of(output: Tensor, y: Tensor) -> Tensor:
    """The mean squared error, in the wider dtype of the two."""
    return (output - y).square().mean()


def _batch(fabric: Fabric, step: int, size: int = BATCH, part: int = 0) -> tuple[Tensor, Tensor]:
    """This process's part of a global batch; ``part``: of its micro-batches of ``size``."""
    data, shard = Samples(BATCH * STEPS), fabric.strategy.shard
    each = size // shard.replicas
    first = step * BATCH + part * size + shard.first * each
    mine = slice(first, first + shard.count * each)
    batch: tuple[Tensor, Tensor] = fabric.to_device((data.x[mine], data.y[mine]))
    return batch


def _attempts(fabric: Fabric) -> int:
    """How often a step may be tried: a loss scale may have to find its place."""
    return 50 if fabric.precision.scales_loss else 1


def _values(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _whole(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU; a sharded tensor has a method for it."""
    return {name: getattr(v, "full_tensor", v.clone)().cpu() for name, v in values.items()}


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(_local(one[name]), _local(other[name])) for name in one)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = getattr(tensor, "to_local", tensor.clone)()
    return local


def _gradient_norm(model: Any) -> float:
    gradients = [_local(p.grad).double() for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(g.square().sum().item() for g in gradients))


def _step(fabric: Fabric, model: Any, optimizer: Any, step: int, told: Stepped) -> None:
    """One step, made once, whether or not it is skipped."""
    x, y = _batch(fabric, step)
    before = _values(model)
    loss = _loss_of(model(x), y)
    fabric.backward(loss)
    told.gradients.append(_gradient_norm(model))
    optimizer.step()
    optimizer.zero_grad()
    told.losses.append(loss.item())
    told.moved.append(_differ(before, _values(model)))
    told.values = _whole(_values(model))


def _step_until_taken(fabric: Fabric, model: Any, optimizer: Any, step: int, told: Stepped) -> None:
    """The same, made again where it was skipped: a scale may begin too large."""
    for _ in range(_attempts(fabric)):
        attempt = Stepped()
        _step(fabric, model, optimizer, step, attempt)
        if attempt.moved[0]:
            break
    told.losses += attempt.losses
    told.gradients += attempt.gradients
    told.moved += attempt.moved
    told.values = attempt.values


def train(fabric: Fabric, optimizer: str) -> Stepped:
    """All steps."""
    model, ready = _set_up(fabric, optimizer)
    told = Stepped()
    for step in range(STEPS):
        _step_until_taken(fabric, model, ready, step, told)
    return told


def plain_steps(optimizer: str, steps: Sequence[int]) -> Stepped:
    """The same by plain torch in float64; ``steps``: which, in order."""
    model = build("plain", SEED).double()
    plain = _OPTIMIZERS[optimizer](model.parameters())
    told, data = Stepped(), Samples(BATCH * STEPS)
    for step in steps:
        mine = slice(step * BATCH, (step + 1) * BATCH)
        loss = _loss_of(model(data.x[mine].double()), data.y[mine].double())
        plain.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        told.losses.append(loss.item())
        told.gradients.append(_gradient_norm(model))
        plain.step()
    told.values = _values(model)
    return told


# -- what has which format -------------------------------------------------------------------------


class Pair(NamedTuple):
    """A collection with a class of its own."""

    first: Any
    second: Any


@dataclass
class Item:
    """Another one."""

    image: Any
    label: Any


class _Spy(nn.Module):
    """Returns what it is given, and remembers what computation is like inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.linear.weight
        self.norm = nn.BatchNorm1d(4)
        self.seen: Any = None

    def forward(self, data: Any) -> Any:
        self.seen = data
        floats = [leaf for leaf in _leaves(data) if leaf.is_floating_point()]
        self.computed = self.linear(floats[0]).dtype if floats else None
        return data


def _leaves(data: Any) -> list[Tensor]:
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list | tuple):
        return [leaf for item in data for leaf in _leaves(item)]
    return []


def formats(fabric: Fabric) -> dict[str, Any]:
    """dtypes of parameters however they came to be, and of computation."""
    with fabric.init_module():
        made = nn.Linear(4, 4)
    model = fabric.setup(_Spy())
    inside: Any = fabric.strategy.original(model.prepared)
    model(fabric.to_device(torch.ones(2, 4)))
    return {
        "init_module": _name(made.weight.dtype),
        "setup": sorted({_name(p.dtype) for p in model.parameters()}),
        "counts": _name(inside.norm.num_batches_tracked.dtype),
        "tied": inside.tied.weight is inside.linear.weight,
        "computed": _name(inside.computed),
        "device_type": (fabric.precision.device_type, fabric.device.type),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def inputs(fabric: Fabric) -> dict[str, Any]:
    """What a model's ``forward`` sees of a batch that holds all sorts of things."""
    model = fabric.setup(_Spy())
    data = torch.tensor([[1.5, -2.25, 3.0, 0.1]])
    given = fabric.to_device(
        {
            "float": data,
            "int": torch.tensor([1, 70000]),
            "bool": torch.tensor([True, False]),
            "byte": torch.tensor([255], dtype=torch.uint8),
            "deep": [data, (torch.tensor([3]), {"more": data})],
            "pair": Pair(data, torch.tensor([4])),
            "item": Item(image=data, label=torch.tensor([5])),
            "text": "kept",
            "numbers": [1, 2.5, None],
        }
    )
    model(given)
    seen = fabric.strategy.original(model.prepared).seen
    return {"seen": seen, "given": given, "data": data}


def outputs(fabric: Fabric) -> dict[str, Any]:
    """What comes out of a model that returns all sorts of things in its own format."""
    model = fabric.setup(_Returns())
    x = fabric.to_device(torch.ones(2, 4))
    told = {"output": model(x), "default": _name(torch.get_default_dtype())}
    told["autocast"] = isinstance(fabric.precision, Autocast)
    with default_dtype(torch.float64):
        told["under float64"] = _name(model(x)["float"].dtype)
    return told


class _Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        float_ = self.linear(x)
        return {
            "float": float_,
            "int": torch.arange(3, device=x.device),
            "bool": torch.arange(3, device=x.device) > 1,
            "deep": [float_, (float_, 1)],
            "pair": Pair(float_, torch.arange(2, device=x.device)),
            "text": "kept",
        }


# -- contexts --------------------------------------------------------------------------------------


def enter_contexts(fabric: Fabric) -> dict[str, Any]:
    """What computation is like outside of the context, in it, in it twice, and behind it."""
    told: dict[str, Any] = {"autocast": isinstance(fabric.precision, Autocast)}
    told["before"] = _surroundings(fabric)
    with fabric.autocast():
        told["inside"] = _surroundings(fabric)
        with fabric.autocast():
            told["twice"] = _surroundings(fabric)
        told["once again"] = _surroundings(fabric)
    told["behind"] = _surroundings(fabric)
    try:
        with fabric.autocast():
            raise KeyError
    except KeyError:
        told["behind an error"] = _surroundings(fabric)
    told.update(_in_a_thread(fabric, beside=told["autocast"]))
    return told


def _surroundings(fabric: Fabric) -> tuple[str, str, str]:
    """dtypes: of a product, of a new tensor, and torch's default."""
    one = torch.ones(2, 2, dtype=torch.float32, device=fabric.device)
    made = torch.ones(1, device=fabric.device).dtype
    return _name((one @ one).dtype), _name(made), _name(torch.get_default_dtype())


def _in_a_thread(fabric: Fabric, *, beside: bool) -> dict[str, Any]:
    """The same in another thread; ``beside``: while this one enters and leaves a context too."""
    told: dict[str, Any] = {}
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        try:
            with fabric.autocast():
                told["in a thread"] = _surroundings(fabric)
                entered.set()
                leave.wait(30)
                told["still in a thread"] = _surroundings(fabric)
        except BaseException as error:
            told["in a thread"] = repr(error)
        entered.set()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(30)
    if beside:
        told["beside a thread"] = _surroundings(fabric)
        with fabric.autocast():
            leave.set()
            thread.join(30)
            told["inside, beside a thread"] = _surroundings(fabric)
    leave.set()
    thread.join(30)
    told["behind a thread"] = _surroundings(fabric)
    return told


def leave_as_found(fabric: Fabric) -> list[tuple[str, tuple[str, str, str]]]:
    """What the process is like after everything that a precision has a part in."""
    told = [("start", _surroundings(fabric))]
    with fabric.init_module():
        nn.Linear(2, 2)
    told.append(("init_module", _surroundings(fabric)))
    model, optimizer = _set_up(fabric, "sgd")
    told.append(("setup", _surroundings(fabric)))
    seen = Stepped()
    _step(fabric, model, optimizer, 0, seen)
    told.append(("a step", _surroundings(fabric)))
    try:
        model("what no model takes")
    except Exception:
        told.append(("an error in forward", _surroundings(fabric)))
    return told


# -- gradients -------------------------------------------------------------------------------------


def clip(fabric: Fabric, loose: float, tight: float) -> dict[str, Any]:
    """The norms that ``clip_gradients`` returns, and how far a step of rate 1 then goes."""
    reason = fabric.strategy.cannot.get("clip_by_norm")
    if reason:
        return {"cannot": reason}
    model, optimizer = _set_up(fabric, "sgd")
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    x, y = _batch(fabric, 0)
    for _ in range(_attempts(fabric)):
        fabric.backward(_loss_of(model(x), y))
        first: Any = fabric.clip_gradients(model, optimizer, max_norm=loose)
        if torch.isfinite(first).all():
            break
        optimizer.step()  # so that the scale may follow
        optimizer.zero_grad()
    again: Any = fabric.clip_gradients(model, optimizer, max_norm=tight)
    clipped: Any = fabric.clip_gradients(model, optimizer, max_norm=loose)
    before = _whole(_values(model))
    optimizer.step()
    after = _whole(_values(model))
    return {
        "norms": [float(norm) for norm in (first, again, clipped)],
        "scalar": [tuple(norm.shape) for norm in (first, again, clipped)],
        "step": sum((after[n].double() - before[n]).square().sum().item() for n in after) ** 0.5,
    }


def unscale(fabric: Fabric) -> list[float]:
    """The norm of the gradients after each of three calls of ``unscale``."""
    model, optimizer = _set_up(fabric, "sgd")
    _step_until_taken(fabric, model, optimizer, 0, Stepped())
    x, y = _batch(fabric, 0)
    fabric.backward(_loss_of(model(x), y))
    norms: list[float] = []
    for _ in range(3):
        fabric.precision.unscale(optimizer.optimizer)
        norms.append(_gradient_norm(model))
    return norms


def backward_plainly(fabric: Fabric) -> dict[str, Any]:
    """What ``loss.backward()`` does in place of ``fabric.backward(loss)``."""
    needed = fabric.precision.scales_loss or fabric.strategy.owns_backward
    x, y = _batch(fabric, 0)
    told: dict[str, Any] = {"needed": needed, "refused": ""}
    for way in ("fabric.backward(loss)", "loss.backward()"):
        model, optimizer = _set_up(fabric, "sgd")
        loss: Any = _loss_of(model(x), y)
        try:
            loss.backward() if way == "loss.backward()" else fabric.backward(loss)
        except TorchweftError as error:
            told["refused"] = str(error)
            continue
        optimizer.step()
        told[way] = _whole(_values(model))
    return told


def overflow(fabric: Fabric, how: str, clipped: bool) -> dict[str, Any]:
    """A step, one whose gradients are not finite, and another one."""
    model, optimizer = _set_up(fabric, "adamw")
    told = Stepped()
    _step_until_taken(fabric, model, optimizer, 0, told)
    before = told.values
    x, y = _batch(fabric, 1)
    # In one rank alone it is one in all.
    alone = fabric.global_rank == fabric.world_size - 1
    if how == "input" and alone:
        x = x.clone()
        x[0, 0] = float("inf")
    loss = _loss_of(model(x), y)
    if how == "loss" and alone:
        loss = loss * float("inf")
    fabric.backward(loss)
    if clipped:
        fabric.clip_gradients(model, optimizer, max_norm=1e3)
    optimizer.step()
    optimizer.zero_grad()
    skipped = _whole(_values(model))
    _step_until_taken(fabric, model, optimizer, 2, told)
    return {"before": before, "skipped": skipped, "told": told}


def accumulate(fabric: Fabric, micro: int) -> dict[str, Tensor]:
    """The parameters after two steps of ``micro`` micro-batches each."""
    model, optimizer = _set_up(fabric, "momentum")
    for step in range(2):
        for _ in range(_attempts(fabric)):
            before = _values(model)
            for i in range(micro):
                x, y = _batch(fabric, step, BATCH // micro, i)
                with fabric.accumulate(model, steps=micro, index=i, scale_loss=True):
                    fabric.backward(_loss_of(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            if _differ(before, _values(model)):
                break
    return _whole(_values(model))


def forget(fabric: Fabric, set_to_none: bool) -> dict[str, Any]:
    """A step behind gradients that were computed and forgotten."""
    model, optimizer = _set_up(fabric, "sgd")
    _step_until_taken(fabric, model, optimizer, 0, Stepped())
    x, y = _batch(fabric, 1)
    fabric.backward(_loss_of(model(x), y))
    optimizer.zero_grad(set_to_none=set_to_none)
    left = [_local(p.grad).abs().max().item() for p in model.parameters() if p.grad is not None]
    told = Stepped()
    _step_until_taken(fabric, model, optimizer, 2, told)
    return {"left": len(left), "largest": max(left, default=0.0), "values": told.values}


# -- the step --------------------------------------------------------------------------------------


class _Returning(SGD):
    """An optimizer whose step returns something."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return "what the optimizer returned"


def returned(fabric: Fabric) -> Any:
    """What ``optimizer.step()`` returns."""
    plain = build("plain", SEED)
    model, optimizer = fabric.setup(plain, _Returning(plain.parameters(), lr=0.1))
    x, y = _batch(fabric, 0)
    result = None
    for _ in range(_attempts(fabric)):
        before = _values(model)
        fabric.backward(_loss_of(model(x), y))
        result = optimizer.step()
        optimizer.zero_grad()
        if _differ(before, _values(model)):
            break
    return result


def closure(fabric: Fabric) -> dict[str, Any]:
    """What ``optimizer.step(closure)`` does."""
    model, optimizer = _set_up(fabric, "sgd")
    x, y = _batch(fabric, 0)
    losses: list[float] = []

    def compute() -> Tensor:
        optimizer.zero_grad()
        loss = _loss_of(model(x), y)
        fabric.backward(loss)
        losses.append(loss.item())
        return loss

    try:
        result = optimizer.step(compute)
    except TorchweftError as error:
        return {"refused": str(error)}
    return {
        "refused": "",
        "result": float(result.detach()),
        "losses": losses,
        "values": _whole(_values(model)),
    }


def evaluate(fabric: Fabric) -> tuple[Tensor, list[Tensor]]:
    """The output of a model that does not train, and what it wrote to gradients."""
    model = fabric.setup(build("plain", SEED)).eval()
    with torch.no_grad():
        output = model(fabric.to_device(Samples(BATCH).x))
    return output, [p.grad for p in model.parameters() if p.grad is not None]


# -- checkpoints -----------------------------------------------------------------------------------


def save_midway(fabric: Fabric, path: Path) -> Stepped:
    """Steps before a checkpoint, among them one that overflows, and what comes after it."""
    model, optimizer = _set_up(fabric, "adamw")
    for step in range(3):
        _step_until_taken(fabric, model, optimizer, step, Stepped())
    if fabric.precision.scales_loss:
        x, y = _batch(fabric, 3)
        fabric.backward(_loss_of(model(x), y) * float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(path, {"model": model, "optimizer": optimizer})
    return _rest(fabric, model, optimizer)


def go_on(fabric: Fabric, path: Path) -> Stepped:
    """What comes after the checkpoint, from the file alone."""
    model, optimizer = _set_up(fabric, "adamw", SEED + 1)
    fabric.load(path, {"model": model, "optimizer": optimizer})
    return _rest(fabric, model, optimizer)


def _rest(fabric: Fabric, model: Any, optimizer: Any) -> Stepped:
    told = Stepped()
    for step in range(3, STEPS):
        _step(fabric, model, optimizer, step, told)
    return told


def read(fabric: Fabric) -> Any:
    """The precision's state in mid-training."""
    model, optimizer = _set_up(fabric, "sgd")
    _step_until_taken(fabric, model, optimizer, 0, Stepped())
    return fabric.precision.state_dict()
