"""Layers that are divided between processes, by the user's plan."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchweft.errors import InvalidRequest, RankFailed
from torchweft.testing import run_ranks
from torchweft_cuda.fsdp import FSDPStrategy


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Tokens to logits; the same weight at both ends."""

    def __init__(self, width=8, words=8):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(self.blocks(self.words(tokens)))


LAYERS = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
ENDS = {
    "words": RowwiseParallel(input_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


def layers(model, mesh):
    return LAYERS


def by_itself(model, mesh):
    """Carries its plan out."""
    assert mesh.mesh_dim_names[-1] == "tensor"
    parallelize_module(model, mesh["tensor"], {**LAYERS, **ENDS})


def in_sequence(model, mesh):
    """Between layers the parts of a sequence are divided, in place of the layers."""
    return {
        "blocks": PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True
        ),
        "blocks.*.norm": SequenceParallel(),
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
        "head": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
        ),
    }


class Divides(Model):
    def parallelize(self, mesh):
        return LAYERS


def trained(fabric, cls, world):
    """The parameters after three steps, and the norms before clipping."""
    torch.manual_seed(1)
    model = cls()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    tokens = torch.arange(24).reshape(6, 4) % 5
    each = 6 // fabric.num_replicas
    first = fabric.strategy.shard.first * each
    norms = []
    for _ in range(3):
        logits = model(fabric.to_device(tokens[first : first + each]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[first:][:each].flatten())
        fabric.backward(loss)
        norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    named = model.named_parameters(remove_duplicate=False)
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in named}
    held = sum(p.to_local().numel() for p in model.blocks.parameters()) if world > 1 else 0
    return norms, {name: tensor.detach() for name, tensor in whole.items()}, held


@pytest.fixture(scope="module")
def right():
    ((norms, parameters, _),) = run_ranks(1, trained, Model, 1, strategy="single_device")
    return norms, parameters


@pytest.mark.parametrize(
    ("how", "cls"),
    [
        (layers, Model),
        (by_itself, Model),
        (in_sequence, Model),
        (LAYERS, Model),
        (f"{__name__}:LAYERS", Model),
        (None, Divides),
    ],
    ids=["a function", "carried out", "in sequence", "a plan", "found by name", "a method"],
)
def test_two_processes_compute_what_one_does(right, how, cls):
    strategy = FSDPStrategy(tensor=2, parallelize=how)
    for norms, parameters, _ in run_ranks(2, trained, cls, 2, strategy=strategy):
        assert norms == pytest.approx(right[0], rel=1e-5)
        torch.testing.assert_close(parameters, right[1])


def test_layers_are_divided_and_the_rest_is_sharded(right):
    strategy = FSDPStrategy(tensor=2, policy=Block, parallelize=by_itself)
    norms, parameters, held = run_ranks(4, trained, Model, 4, strategy=strategy)[3]
    assert norms == pytest.approx(right[0], rel=1e-5)
    torch.testing.assert_close(parameters, right[1])
    whole = sum(p.numel() for p in Model().blocks.parameters())
    # What is divided and sharded takes a quarter, norms and biases of rows half.
    assert whole / 4 <= held < whole / 3


class Uneven(Model):
    """Of six words two processes have three each, which other two cannot halve."""

    def __init__(self):
        super().__init__(words=6)


def test_what_is_divided_and_sharded_unevenly_is_right_or_refused():
    ((norms, parameters, _),) = run_ranks(1, trained, Uneven, 1, strategy="single_device")
    strategy = FSDPStrategy(tensor=2, parallelize=by_itself)
    if torch.__version__ < "2.10":
        # It puts the rows together in another order.
        words = (
            "'words.weight', of shape (6, 8), is split into 4 parts along dimension 0, by tensor= "
            "and again by shard=, which do not divide 6; torch"
        )
        with pytest.raises(RankFailed, match=re.escape(words)):
            run_ranks(4, trained, Uneven, 4, strategy=strategy)
        return
    for mine, whole, _ in run_ranks(4, trained, Uneven, 4, strategy=strategy):
        assert mine == pytest.approx(norms, rel=1e-5)
        torch.testing.assert_close(whole, parameters)


def test_in_three_dimensions(right):
    strategy = FSDPStrategy(tensor=2, replicate=2, parallelize=layers)
    # Copies, parts and layers: of six samples, two replicas have three each.
    for norms, parameters, _ in run_ranks(4, trained, Model, 4, strategy=strategy):
        assert norms == pytest.approx(right[0], rel=1e-5)
        torch.testing.assert_close(parameters, right[1])


def saves(fabric, path):
    model = fabric.setup(Model())
    fabric.save(path, {"model": model})


def test_saving_says_nothing(tmp_path, capfd):
    strategy = FSDPStrategy(tensor=2, policy=Block, parallelize=by_itself)
    run_ranks(4, saves, tmp_path / "x.ckpt", strategy=strategy)
    assert capfd.readouterr() == ("", "")


# -- what is refused -------------------------------------------------------------------------------


def set_up(fabric, cls, *arguments):
    fabric.setup(cls(*arguments))


def refused(how, cls=Model, *arguments):
    with pytest.raises(RankFailed) as failed:
        run_ranks(2, set_up, cls, *arguments, strategy=FSDPStrategy(tensor=2, parallelize=how))
    return str(failed.value)


def test_a_name_that_is_no_module():
    assert (
        "the plan for tensor parallelism names 'blocks.*.upp', and Model has no module of that "
        "name; did you mean 'blocks.1.up'? it has words, blocks, blocks.0, blocks.0.norm, "
        "blocks.0.up, blocks.0.down, blocks.1, blocks.1.norm and 3 more"
    ) in refused({"blocks.*.upp": ColwiseParallel()})


def test_a_dimension_that_does_not_divide():
    assert (
        "the plan for tensor parallelism divides 'words.weight', of shape (7, 8), along dimension "
        "0, and 7 is not divisible by tensor=2; leave that module out of the plan, or make the "
        "dimension a multiple of 2"
    ) in refused({"words": RowwiseParallel(input_layouts=Replicate())}, nn_words, 7)


def nn_words(words):
    return nn.ModuleDict({"words": nn.Embedding(words, 8)})


def test_one_parameter_divided_in_two_ways():
    assert (
        "'words.weight' and 'head.weight' are one parameter, and the plan for tensor parallelism "
        "divides it in two ways, (Shard(dim=0),) and (not divided); name the modules of both in "
        "the plan, so that both are divided along the same dimension"
    ) in refused({"words": RowwiseParallel(input_layouts=Replicate())})


def test_nothing_says_how():
    assert (
        "strategy 'fsdp' was given tensor=2, and nothing says how Model is divided: pass "
        "FSDPStrategy(tensor=…, parallelize=…) a function of (model, mesh) or a plan {'name of a "
        "module': ColwiseParallel()}, or give Model a method parallelize(self, mesh)"
    ) in refused(None)


def returns_a_number(model, mesh):
    return 3


def test_a_function_that_returns_something_else():
    assert "what divides Model returned something of type int; it returns a plan" in refused(
        returns_a_number
    )


def test_a_plan_that_cannot_be_found():
    assert (
        "strategy 'fsdp' was given parallelize=torch:no_plan, which cannot be loaded: module "
        "'torch' has no attribute 'no_plan'"
    ) in refused("torch:no_plan")


@pytest.mark.parametrize("value", [3, "plan"])
def test_what_is_no_plan(value):
    with pytest.raises(InvalidRequest) as told:
        FSDPStrategy(parallelize=value)
    assert str(told.value) == (
        f"strategy 'fsdp' was given parallelize={value!r}; it takes a function of (model, mesh), a "
        "plan {'name of a module': ColwiseParallel()}, or where one is found: 'module:name'"
    )
