"""torchweft.checkpoint.state: the user's objects into a checkpoint and back."""

from __future__ import annotations

import collections
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from torchweft.api import Place, Precision, RankInfo, Rendezvous, RunPlan, Strategy
from torchweft.builtin.cpu import CPU
from torchweft.checkpoint.file import read, write
from torchweft.checkpoint.restoring import restore
from torchweft.checkpoint.state import collect
from torchweft.errors import CheckpointError, InvalidRequest
from torchweft.wrappers import FabricModule, wrap_optimizer


class Wrapping(Strategy):
    """Wraps modules as DDP does, and keeps a counter between steps."""

    rounds = 0

    def original(self, module: nn.Module) -> nn.Module:
        return module.module

    def extra_state(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_extra_state(self, state: Any) -> None:
        self.rounds = state["rounds"]


class Scaling(Precision):
    scale_ = torch.tensor(1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale_}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale_ = state["scale"]


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Setting:
    """One process with a strategy and a precision, and objects that were set up in it."""

    def __init__(
        self, strategy: Strategy | None = None, precision: Precision | None = None
    ) -> None:
        self.strategy = strategy or Strategy()
        self.precision = precision or Precision()
        self.strategy.start(
            Place(
                plan=cast(RunPlan, None),
                rank=RankInfo(),
                rendezvous=Rendezvous(),
                accelerator=CPU(),
                device=torch.device("cpu"),
                precision=self.precision,
            )
        )
        self.parts = {"strategy": self.strategy, "precision": self.precision}

    def setup(self, module: nn.Module, optimizer: Optimizer | None = None) -> Any:
        prepared = Wrapped(module) if isinstance(self.strategy, Wrapping) else module
        model = FabricModule(module, prepared, self.strategy, self.precision, [False])
        if optimizer is None:
            return model
        return model, wrap_optimizer(optimizer, self.strategy, [prepared])

    def collect(self, state: Any, is_writer: bool = True, filter: Any = None) -> Any:
        return collect(state, is_writer=is_writer, filter=filter, **self.parts)

    def restore(self, content: Any, state: Any, strict: bool = True) -> Any:
        return restore(content, state, strict=strict, **self.parts)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.0), nn.Linear(8, 2))


def train(model: Any, optimizer: Any, steps: int, scheduler: Any = None) -> list[float]:
    generator = torch.Generator().manual_seed(steps)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(16, 3, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def through_file(content: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.ckpt")
        write(path, content)
        return read(path)


def unequal(a: nn.Module, b: nn.Module) -> list[str]:
    here, there = a.state_dict(), b.state_dict()
    assert list(here) == list(there)
    return [name for name in here if not torch.equal(here[name], there[name])]


# -- a run that goes on --------------------------------------------------------------------------


@pytest.mark.parametrize("wrapping", [Strategy, Wrapping])
def test_the_next_losses_are_those_of_a_run_that_never_stopped(wrapping: Any) -> None:
    def build(seed: int) -> tuple[Setting, dict[str, Any]]:
        setting = Setting(wrapping(), Scaling())
        module = network(seed)
        groups = [
            {"params": module[0].parameters(), "lr": 0.05},
            {"params": [*module[1].parameters(), *module[3].parameters()]},
        ]
        model, optimizer = setting.setup(module, AdamW(groups, lr=0.01))
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return setting, {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0}

    setting, state = build(seed=0)
    train(state["model"], state["optimizer"], 5, state["scheduler"])
    state["step"] = 5
    setting.precision.scale_ = torch.tensor(8.0)  # type: ignore[attr-defined]
    content = through_file(setting.collect(state))

    other_setting, other = build(seed=1)
    assert other_setting.restore(content, other) == {}
    assert other["step"] == 5
    assert other_setting.precision.scale_ == 8.0  # type: ignore[attr-defined]
    assert unequal(state["model"], other["model"]) == []
    expected = train(state["model"], state["optimizer"], 4, state["scheduler"])
    assert train(other["model"], other["optimizer"], 4, other["scheduler"]) == expected


def test_the_file_is_plain_and_by_the_users_names() -> None:
    setting = Setting(Wrapping(), Scaling())
    model, optimizer = setting.setup(module := network(), SGD(module.parameters(), 0.1, 0.9))
    train(model, optimizer, 1)
    content = through_file(setting.collect({"model": model, "optimizer": optimizer, "epoch": 3}))
    assert list(content) == ["model", "optimizer", "epoch", "torchweft"]
    assert list(content["model"]) == list(module.state_dict())
    assert content["model"]._metadata == module.state_dict()._metadata
    assert list(content["optimizer"]["state"]) == [name for name, _ in module.named_parameters()]
    assert content["torchweft"] == {
        "format": 1,
        "precision": {"scale": torch.tensor(1.0)},
        "strategy": {"rounds": 0},
    }
    # Plain torch fills a plain module from it.
    plain = network(seed=1)
    plain.load_state_dict(content["model"])
    assert unequal(plain, module) == []


def test_the_strategy_and_the_precision_go_on_together_with_an_optimizer() -> None:
    source = Setting(Wrapping(), Scaling())
    source.strategy.rounds = 7  # type: ignore[attr-defined]
    source.precision.scale_ = torch.tensor(8.0)  # type: ignore[attr-defined]
    model, optimizer = source.setup(module := network(), SGD(module.parameters(), 0.1))
    content = source.collect({"model": model, "optimizer": optimizer})

    # Weights alone, as of a teacher, do not touch the run's own counters.
    target = Setting(Wrapping(), Scaling())
    target.restore(content, {"model": model})
    assert (target.strategy.rounds, target.precision.scale_) == (0, 1.0)  # type: ignore[attr-defined]
    target.restore(content, {"parts": [{"optimizer": 1}]}, strict=False)
    assert (target.strategy.rounds, target.precision.scale_) == (0, 1.0)  # type: ignore[attr-defined]
    target.restore(content, {"model": model, "optimizer": optimizer})
    assert (target.strategy.rounds, target.precision.scale_) == (7, 8.0)  # type: ignore[attr-defined]
    # What another precision wrote, which keeps nothing, is no reason to reset this one.
    stateless = Setting()
    own, its_optimizer = stateless.setup(module := network(), SGD(module.parameters(), 0.1))
    plain = stateless.collect({"model": own, "optimizer": its_optimizer})
    target.restore(plain, {"model": model, "optimizer": optimizer})
    assert (target.strategy.rounds, target.precision.scale_) == (7, 8.0)  # type: ignore[attr-defined]


def test_a_state_of_another_strategy_that_does_not_fit_is_named() -> None:
    setting = Setting(Wrapping(), Scaling())
    optimizer = SGD(nn.Linear(1, 1).parameters(), 0.1)
    content = setting.collect({"optimizer": optimizer})
    content["torchweft"]["strategy"] = {"other": 1}
    with pytest.raises(CheckpointError) as caught:
        setting.restore(content, {"optimizer": optimizer})
    assert str(caught.value) == (
        "cannot restore torchweft['strategy'] (Wrapping): KeyError('rounds')"
    )


# -- what is collected ---------------------------------------------------------------------------


class Counter:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


Models = collections.namedtuple("Models", "first second")


def test_objects_inside_of_containers_give_their_state() -> None:
    setting = Setting()
    inner = setting.setup(nn.Linear(2, 2))
    state = {
        "list": [nn.Linear(2, 2), {"counter": Counter(3), "plain": "x"}],
        "named": Models(inner, 5),
        "plain": {"kept": [1, 2]},
        "ordered": OrderedDict(a=Counter(1)),
    }
    content = setting.collect(state)
    assert list(content["list"][0]) == ["weight", "bias"]
    assert content["list"][1] == {"counter": {"value": 3}, "plain": "x"}
    assert type(content["named"]) is Models
    assert list(content["named"].first) == ["weight", "bias"]
    assert content["named"].second == 5
    assert content["plain"] is state["plain"]  # what holds no object is not copied
    assert type(content["ordered"]) is OrderedDict
    assert content["ordered"]["a"] == {"value": 1}
    assert isinstance(state["list"][0], nn.Module)  # and the user's containers are not changed


def test_objects_inside_of_containers_are_filled() -> None:
    def build(value: int) -> dict[str, Any]:
        torch.manual_seed(value)
        return {
            "list": [nn.Linear(2, 2), {"counter": Counter(value), "plain": value}, value],
            "tuple": (Counter(value), value),
            "same": (Counter(value),),
            "named": Models(Counter(value), value),
            "plain": {"replaced": [value]},
        }

    content = Setting().collect(build(1))
    state = build(2)
    before = copy.copy(state)
    assert Setting().restore(content, state) == {}
    assert state["list"] is before["list"]
    assert unequal(state["list"][0], build(1)["list"][0]) == []
    assert state["list"][1]["counter"].value == 1
    assert state["list"][1]["plain"] == state["list"][2] == 1
    assert state["tuple"][0] is before["tuple"][0]
    assert (state["tuple"][0].value, state["tuple"][1]) == (1, 1)
    assert state["same"] is before["same"]
    assert (type(state["named"]), state["named"].first.value, state["named"].second) == (
        Models,
        1,
        1,
    )
    assert state["plain"] == {"replaced": [1]}


leaves = st.one_of(
    st.integers(),
    st.text(max_size=3),
    st.integers(0, 9).map(Counter),
    st.integers(0, 9).map(lambda value: torch.full((2,), value)),
)
states = st.dictionaries(
    st.text(max_size=3).filter(lambda key: key != "torchweft"),
    st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.text(max_size=3), inner, max_size=3),
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def plain_form(value: Any) -> Any:
    """The same with numbers in place of counters and tensors, to be compared."""
    if isinstance(value, Counter):
        return ("counter", value.value)
    if isinstance(value, Tensor):
        return ("tensor", value.tolist())
    if isinstance(value, dict):
        return {key: plain_form(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain_form(item) for item in value)
    return value


def reset(value: Any) -> Any:
    """A copy of the same form with all counters at zero and plain values forgotten."""
    if isinstance(value, Counter):
        return Counter(0)
    if isinstance(value, dict):
        return {key: reset(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(reset(item) for item in value)
    return None


@settings(max_examples=60, deadline=None)
@given(states)
def test_any_nesting_comes_back(state: dict[str, Any]) -> None:
    content = through_file(Setting().collect(state))
    target = reset(state)
    assert Setting().restore(content, target) == {}
    assert plain_form(target) == plain_form(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 2),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
        ),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
    ],
)
def test_torchs_schedulers_go_on(make: Any) -> None:
    def build() -> dict[str, Any]:
        setting = Setting()
        model, optimizer = setting.setup(module := network(), SGD(module.parameters(), 0.1, 0.9))
        return {"model": model, "optimizer": optimizer, "scheduler": make(optimizer)}

    first, second = build(), build()
    train(first["model"], first["optimizer"], 4, first["scheduler"])
    content = through_file(Setting().collect(first))
    Setting().restore(content, second)
    for _ in range(3):
        for state in (first, second):
            state["optimizer"].step()
            state["scheduler"].step()
        assert first["scheduler"].get_last_lr() == second["scheduler"].get_last_lr()
        assert first["optimizer"].param_groups[0]["lr"] == second["optimizer"].param_groups[0]["lr"]


def test_a_plateau_scheduler_goes_on() -> None:
    optimizer = SGD(nn.Linear(1, 1).parameters(), 0.1)
    source = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    source.step(1.0)
    target = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    Setting().restore(through_file(Setting().collect({"s": source})), {"s": target})
    assert target.best == 1.0


def test_filter_chooses_entries_by_name_and_value() -> None:
    setting = Setting(Wrapping())
    model, optimizer = setting.setup(module := network(), SGD(module.parameters(), 0.1))
    state = {"model": model, "plain": network(), "optimizer": optimizer, "values": {"a": 1, "b": 2}}
    seen = []

    def large(name: str, value: Tensor) -> bool:
        seen.append(name)
        return value.numel() > 10

    content = setting.collect(
        state,
        filter={
            "model": large,
            "plain": lambda name, value: name.startswith("3."),
            "optimizer": lambda name, value: name == "state",
            "values": lambda name, value: value == 2,
        },
    )
    assert seen == list(module.state_dict())
    assert list(content["model"]) == ["0.weight", "3.weight"]
    assert list(content["plain"]) == ["3.weight", "3.bias"]
    assert content["plain"]._metadata == module.state_dict()._metadata
    assert list(content["optimizer"]) == ["state"]
    assert content["values"] == {"b": 2}
    assert state["values"] == {"a": 1, "b": 2}
    # Such a file fills what it holds.
    other = setting.setup(network(seed=1))
    setting.restore(content, {"model": other}, strict=False)
    assert "0.weight" not in unequal(other, model)
    assert "0.bias" in unequal(other, model)


def test_wrong_requests_are_errors_that_say_what_to_write() -> None:
    cases: list[tuple[Any, Any, str]] = [
        (
            network(),
            None,
            (
                "the state to save is of type Sequential; give a dict, such as {'model': model, "
                "'optimizer': optimizer}"
            ),
        ),
        (
            {"torchweft": 1},
            None,
            "the key 'torchweft' of a checkpoint is reserved; give that part another name",
        ),
        (
            {"model": 1, "epoch": 2},
            {"modle": len},
            (
                "filter has the key 'modle', which is not in the state; did you mean 'model'? it "
                "holds 'model', 'epoch'"
            ),
        ),
        (
            {"epoch": 2},
            {"epoch": lambda name, value: True},
            (
                "filter is given for state['epoch'], which is of type int and has no entries to "
                "choose from"
            ),
        ),
        (
            {"model": network()},
            {"model": "0.weight"},
            (
                "filter['model'] is of type str; give a function of (name, value) that returns "
                "whether to keep it"
            ),
        ),
        (
            {"model": network()},
            len,
            (
                "filter is of type builtin_function_or_method; give a dict with keys of the state, "
                "such as {'model': lambda name, value: 'head' in name}"
            ),
        ),
    ]
    for state, filter, words in cases:
        with pytest.raises(InvalidRequest) as caught:
            Setting().collect(state, filter=filter)
        assert str(caught.value) == words


def test_tensors_without_data_are_not_written() -> None:
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    for model in (empty, Setting().setup(empty)):
        with pytest.raises(CheckpointError) as caught:
            Setting().collect({"model": model})
        assert str(caught.value) == (
            "state['model']['weight'] is on the meta device and holds no data; fill it before "
            "saving"
        )


def test_tied_parameters_are_written_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(100, 100, bias=False)
            self.b = nn.Linear(100, 100, bias=False)
            self.b.weight = self.a.weight

    setting = Setting()
    write(tmp_path / "x.ckpt", setting.collect({"model": setting.setup(Tied())}))
    assert (tmp_path / "x.ckpt").stat().st_size < 60_000
    assert list(read(tmp_path / "x.ckpt")["model"]) == ["a.weight", "b.weight"]


class Streaming(Strategy):
    """Hands out one temporary tensor at a time and sees who is still held."""

    def module_state(self, module: nn.Module) -> Any:
        for name, value in module.state_dict().items():
            self.handed = [*getattr(self, "handed", []), name]
            yield name, value.clone().requires_grad_(value.is_floating_point())


def test_every_process_iterates_and_the_writer_alone_keeps() -> None:
    for is_writer in (True, False):
        setting = Setting(Streaming())
        model = setting.setup(network())
        content = setting.collect({"model": model}, is_writer=is_writer)
        assert setting.strategy.handed == list(model.state_dict())  # type: ignore[attr-defined]
        if is_writer:
            assert not any(value.requires_grad for value in content["model"].values())
        else:
            assert content is None


class Gathered(Tensor):
    """Counts how often it is made whole, for which all processes are needed."""

    count = 0

    def full_tensor(self) -> Tensor:
        Gathered.count += 1
        return self.as_subclass(Tensor)


class Sharding(Strategy):
    def module_state(self, module: nn.Module) -> Any:
        for name, value in module.state_dict().items():
            yield name, value.as_subclass(Gathered)


class Unasked:
    def state_dict(self) -> Any:
        raise ValueError("not now")


class Holding:
    def __init__(self, held: Any) -> None:
        self.held = held

    def state_dict(self) -> Any:
        return {"held": self.held}


@pytest.mark.parametrize("is_writer", [True, False])
def test_what_fails_is_told_when_all_is_gathered(is_writer: bool) -> None:
    def fails(name: str, value: Any) -> bool:
        raise KeyError(name)

    setting = Setting(Sharding())
    model = setting.setup(network())
    more = [torch.zeros(2, device="meta"), torch.ones(2).as_subclass(Gathered)]
    each = len(model.state_dict())
    cases: list[tuple[Any, Any, Any, int]] = [
        ({"a": model, "b": model}, {"a": fails}, KeyError, 2 * each),
        ({"a": more, "b": [model, *more]}, None, CheckpointError, each + 2),
        ({"a": Holding(more), "b": model}, None, CheckpointError, each + 1),
        ({"n": 3, "b": model}, {"n": fails}, InvalidRequest, each),
    ]
    for state, filter, error, count in cases:
        Gathered.count = 0
        if is_writer:
            with pytest.raises(error):
                setting.collect(state, filter=filter)
        else:
            setting.collect(state, is_writer=False, filter=filter)
        assert Gathered.count == count
    # Objects are asked for their state before anything is gathered.
    Gathered.count = 0
    with pytest.raises(ValueError, match="not now"):
        setting.collect({"model": model, "last": Unasked()}, is_writer=is_writer)
    assert Gathered.count == 0


GATHERING = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchweft.api import Place, Precision, RankInfo, Rendezvous, RunPlan, Strategy
from torchweft.builtin.cpu import CPU
from torchweft.checkpoint.state import collect
from torchweft.wrappers import FabricModule, wrap_optimizer

rank, folder = int(sys.argv[1]), sys.argv[2]
store = dist.FileStore(folder + "/store", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
module = nn.Linear(3, 5)
whole = {name: value.clone() for name, value in module.state_dict().items()}
for name, parameter in list(module.named_parameters()):
    sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
    setattr(module, name, sharded)
optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
for parameter in module.parameters():
    parameter.grad = parameter.detach().clone()
optimizer.step()
shapes = []

strategy, precision = Strategy(), Precision()
model = FabricModule(module, module, strategy, precision, [False])
state = {"model": model, "optimizer": wrap_optimizer(optimizer, strategy, [module]),
         "plain": [module]}
def keep(name, value):
    shapes.append(list(value.shape))
    return True
content = collect(state, strategy=strategy, precision=precision, is_writer=rank == 0,
                  filter={"model": keep})
result = "nothing"
if content is not None:
    def near(tensor, name, factor):
        return type(tensor) is torch.Tensor and torch.allclose(tensor, whole[name] * factor)
    result = [
        all(near(content["model"][n], n, 0.9) for n in whole),
        all(near(content["plain"][0][n], n, 0.9) for n in whole),
        all(near(content["optimizer"]["state"][n]["momentum_buffer"], n, 1) for n in whole),
        shapes,
    ]
print(json.dumps(result), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_tensors_are_made_whole_on_the_writer(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", GATHERING, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = []
        for rank in ranks:
            output, errors = rank.communicate(timeout=100)
            assert rank.returncode == 0, errors
            results.append(json.loads(output.splitlines()[-1]))  # gloo may say something before
    finally:
        for rank in ranks:
            rank.kill()
    assert results == [[True, True, True, [[5, 3], [5]]], "nothing"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_checkpoint_moves_from_a_gpu_to_the_cpu() -> None:
    setting = Setting()
    module = network().cuda()
    model, optimizer = setting.setup(module, AdamW(module.parameters(), lr=0.02, fused=True))
    for _ in range(2):
        model(torch.ones(4, 3, device="cuda")).sum().backward()
        optimizer.step()
    state = {
        "model": model,
        "optimizer": optimizer,
        "plain": [module],
        "value": torch.ones(1).cuda(),
    }
    content = setting.collect(state)
    assert (
        content["model"]._metadata == content["plain"][0]._metadata == module.state_dict()._metadata
    )
    content = through_file(content)
    assert content["value"].device.type == "cpu"
    other, its_optimizer = setting.setup(here := network(seed=1), AdamW(here.parameters()))
    setting.restore(content, {"model": other, "optimizer": its_optimizer})
    assert unequal(other, copy.deepcopy(module).cpu()) == []
    assert its_optimizer.param_groups[0]["lr"] == 0.02
    assert not its_optimizer.param_groups[0]["fused"]
    assert {v.device.type for s in its_optimizer.state.values() for v in s.values()} == {"cpu"}
    train(other, its_optimizer, 1)


# -- what is restored ----------------------------------------------------------------------------


def test_what_is_not_asked_for_is_returned() -> None:
    model = network()
    content = Setting().collect({"model": model, "epoch": 3, "extra": {"a": 1}})
    state: dict[str, Any] = {"epoch": 0}
    left = Setting().restore(content, state)
    assert state == {"epoch": 3}
    assert list(left) == ["model", "extra"]
    assert left["extra"] == {"a": 1}
    assert "torchweft" in content  # what was given is not changed
    assert list(Setting().restore(content, {})) == ["model", "epoch", "extra"]


def test_a_key_that_the_checkpoint_lacks_is_named_and_nothing_is_touched() -> None:
    content = Setting().collect({"model": network(), "epoch": 3})
    model = network(seed=1)
    with pytest.raises(CheckpointError) as caught:
        Setting().restore(content, {"model": model, "epcoh": 0})
    assert str(caught.value) == (
        "the checkpoint has no 'epcoh'; did you mean 'epoch'? it holds 'model', 'epoch'. Pass "
        "strict=False to load without"
    )
    assert unequal(model, network(seed=1)) == []
    with pytest.raises(CheckpointError, match="has no 'optimizer', 'step'; it holds 'model'"):
        Setting().restore(content, {"model": model, "optimizer": 0, "step": 1})
    state = {"model": model, "step": 1}
    assert Setting().restore(content, state, strict=False) == {"epoch": 3}
    assert state["step"] == 1
    assert unequal(model, network()) == []


def test_what_does_not_fit_is_named_with_its_place() -> None:
    setting = Setting()
    content = setting.collect({"model": nn.Linear(2, 2), "nested": [Counter()], "step": 1})
    cases: list[tuple[Any, str]] = [
        (
            {"model": nn.Linear(3, 2)},
            (
                "cannot restore state['model'] (Linear): the checkpoint is of another model: "
                "'weight' is (2, 2) in the checkpoint and (2, 3) in the model"
            ),
        ),
        (
            {"model": setting.setup(nn.Linear(2, 2, bias=False))},
            (
                "cannot restore state['model'] (FabricModule): the model has no 'bias'; the "
                "checkpoint holds 'weight', 'bias'"
            ),
        ),
        (
            {"step": nn.Linear(2, 2)},
            (
                "cannot restore state['step'] (Linear): the checkpoint's part is of type int, not "
                "the state of a model"
            ),
        ),
        (
            {"model": Counter()},
            "cannot restore state['model'] (Counter): KeyError('value')",
        ),
        (
            {"model": SGD(nn.Linear(1, 1).parameters(), 0.1)},
            (
                "cannot restore state['model'] (SGD): this is not the state of an optimizer: it "
                "has no 'state'; it holds 'weight', 'bias'"
            ),
        ),
        ({"nested": [Counter(), 1]}, "state['nested'] has 2 items, and 1 in the checkpoint"),
        (
            {"nested": {"a": Counter()}},
            "state['nested'] is of type dict, and of type list in the checkpoint",
        ),
        ({"step": [Counter()]}, "state['step'] is of type list, and of type int in the checkpoint"),
        (
            {"model": {"weight": Counter()}},
            "state['model'] has the keys 'weight', and in the checkpoint 'weight', 'bias'",
        ),
        (
            MappingProxyType({"step": 0}),
            (
                "state['step'] is to be replaced by the checkpoint's value, but its container is "
                "of type mappingproxy, which cannot be changed; use a dict"
            ),
        ),
    ]
    for state, words in cases:
        with pytest.raises(CheckpointError) as caught:
            setting.restore(content, state)
        assert str(caught.value) == words


def test_an_object_that_can_only_be_saved_is_an_error() -> None:
    class Half:
        def state_dict(self) -> dict[str, int]:
            return {}

    content = Setting().collect({"half": Half()})
    with pytest.raises(CheckpointError, match=r"\(Half\): it has state_dict\(\) and no load_state"):
        Setting().restore(content, {"half": Half()})


def test_one_model_or_optimizer_is_filled_from_its_own_state() -> None:
    setting = Setting(Wrapping())
    source = network()
    model, optimizer = setting.setup(module := network(seed=1), Adam(module.parameters()))
    for target in (network(seed=2), model):
        assert setting.restore(through_file(source.state_dict()), target) == {}
        assert unequal(target, source) == []
    other = Adam(source.parameters(), lr=0.7)
    setting.restore(through_file(other.state_dict()), optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.7
    with pytest.raises(CheckpointError) as caught:
        setting.restore(setting.collect({"model": model, "epoch": 1}), model)
    assert str(caught.value) == (
        "the checkpoint holds 'model', 'epoch', not the state of one FabricModule alone; load it "
        "with a dict, such as {'model': model}"
    )
    with pytest.raises(
        InvalidRequest, match="an object of type int cannot be filled from a checkpoint; give a"
    ):
        setting.restore({}, 3)


def test_a_checkpoint_that_is_no_dict_is_an_error() -> None:
    with pytest.raises(
        CheckpointError, match="the checkpoint is of type list, not a dict with 'model', 'epoch'"
    ):
        Setting().restore([1], {"model": network(), "epoch": 1})


def test_a_file_of_plain_torch_with_states_by_index() -> None:
    module = network()
    plain = AdamW(module.parameters(), lr=0.02)
    train(module, plain, 3)
    content = through_file(
        {"model": module.state_dict(), "optimizer": plain.state_dict(), "epoch": 2}
    )
    setting = Setting(Wrapping(), Scaling())
    model, optimizer = setting.setup(other := network(seed=1), AdamW(other.parameters()))
    state = {"model": model, "optimizer": optimizer}
    assert setting.restore(content, state) == {"epoch": 2}
    assert train(model, optimizer, 3) == train(module, plain, 3)


@pytest.mark.parametrize("prefix", ["module.", "_forward_module.", "_forward_module.module."])
def test_the_names_of_raw_wrappers_are_accepted(prefix: str) -> None:
    source = network()
    wrapped: nn.Module = source
    for name in reversed(prefix.rstrip(".").split(".")):
        outer = nn.Module()
        outer.add_module(name, wrapped)
        wrapped = outer
    content = through_file({"model": wrapped.state_dict()})
    assert all(name.startswith(prefix) for name in content["model"])
    setting = Setting(Wrapping())
    for target in (network(seed=1), setting.setup(network(seed=1))):
        setting.restore(content, {"model": target})
        assert unequal(target, source) == []
    assert all(name.startswith(prefix) for name in content["model"])


def test_a_prefix_that_is_the_models_own_stays() -> None:
    source, target = Wrapped(network()), Wrapped(network(seed=1))
    Setting().restore({"model": source.state_dict()}, {"model": target})
    assert unequal(source, target) == []


class Versioned(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("prefixed", [False, True])
def test_modules_see_the_version_they_were_saved_with(prefixed: bool) -> None:
    setting = Setting(Wrapping())
    source = nn.Sequential(Versioned(2, 2))
    saved = Wrapped(source) if prefixed else setting.setup(source)
    content = through_file(setting.collect({"model": saved}))
    target = setting.setup(nn.Sequential(Versioned(2, 2)))
    setting.restore(content, {"model": target})
    assert unequal(target, source) == []


def test_a_checkpoint_of_a_later_format_is_refused_before_anything_is_filled() -> None:
    content = Setting().collect({"model": network()})
    content["torchweft"]["format"] = 2
    model = network(seed=1)
    with pytest.raises(CheckpointError) as caught:
        Setting().restore(content, {"model": model})
    assert str(caught.value) == (
        "the checkpoint is of format 2, and this torchweft reads up to 1; it was written by a "
        "later version: pip install --upgrade torchweft"
    )
    assert unequal(model, network(seed=1)) == []
    for wrong in (3, {"format": "x"}):
        with pytest.raises(CheckpointError, match="'torchweft' is not what torchweft writes"):
            Setting().restore({"torchweft": wrong}, {})
