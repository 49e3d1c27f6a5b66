"""Choosing the modules that ``fsdp`` gathers one by one."""

from __future__ import annotations

import pytest
from torch import nn

from torchweft.errors import InvalidRequest
from torchweft_cuda.parts import checked, choose, unshared


class Block(nn.Sequential):
    pass


def model(depth=8, width=8):
    blocks = nn.ModuleList(Block(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
    return nn.ModuleDict({"first": nn.Linear(width, 4 * width), "blocks": blocks})


def names(module, value, option="policy"):
    chosen = choose(module, option, checked(option, value))
    return [name for name, each in module.named_modules() if each in chosen]


def is_first_block(module):
    return isinstance(module, Block) and module[0].in_features == 8


def test_nothing_is_chosen_where_nothing_is_said():
    assert names(model(), None) == []


@pytest.mark.parametrize("value", ["Block", Block, (Block,), [Block], is_first_block])
def test_by_class_or_function(value):
    assert names(model(2), value) == ["blocks.0", "blocks.1"]


def test_several_classes_inner_ones_first():
    module = model(1)
    chosen = choose(module, "policy", "Block+Linear")
    assert chosen == [module["blocks"][0][0], module["blocks"][0], module["first"]]


def test_by_size_blocks_are_found_and_small_parts_stay_with_the_whole():
    module = nn.Sequential(
        nn.Linear(64, 256, bias=False),
        nn.ModuleList(Block(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(8)),
        nn.LayerNorm(8),
    )
    assert names(module, "auto") == ["0", *(f"1.{i}" for i in range(8))]


def test_by_size_what_is_larger_than_a_quarter_is_looked_into():
    module = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
    assert names(module, "auto") == ["0.0", "0.1", "1"]


def test_what_shares_a_parameter_with_the_rest_is_gathered_with_it():
    module = model(2)
    module["blocks"][1][0].weight = module["blocks"][0][0].weight
    assert unshared(choose(module, "policy", "Block"), module) == []
    assert unshared([module["blocks"]], module) == [module["blocks"]]


def test_a_choice_of_nothing_lists_the_classes():
    with pytest.raises(InvalidRequest) as refused:
        names(model(1), "Blok", "activation_checkpointing")
    assert str(refused.value) == (
        "strategy 'fsdp' was given activation_checkpointing=Blok, which chooses no part of "
        "ModuleDict; did you mean 'Block'? its modules are of the classes Block, Linear, "
        "ModuleList, Tanh"
    )
    with pytest.raises(InvalidRequest) as refused:
        names(nn.Linear(2, 2), (Block, nn.Tanh))
    assert str(refused.value) == (
        "strategy 'fsdp' was given policy=Block+Tanh, which chooses no part of Linear; it has no "
        "modules"
    )


@pytest.mark.parametrize("value", [3, (), (nn.Linear, "Tanh")])
@pytest.mark.parametrize("option", ["policy", "activation_checkpointing"])
def test_what_is_no_choice(option, value):
    with pytest.raises(InvalidRequest) as refused:
        checked(option, value)
    assert str(refused.value) == (
        f"strategy 'fsdp' was given {option}={value!r}; it takes names of classes joined by '+', "
        f"such as {option}=Block+Embedding, classes of modules, or a function of a module"
    )
