"""Strategy ``fsdp``: what each process holds, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchweft.errors import InvalidRequest, Misuse, RankFailed
from torchweft.testing import run_ranks
from torchweft_cuda.fsdp import FSDPStrategy


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 4)))


def held(fabric):
    """Numbers of parameters, gradients and optimizer state that this process holds, and all."""
    plain = model()
    total = sum(p.numel() for p in plain.parameters())
    wrapped, optimizer = fabric.setup(plain, torch.optim.Adam(plain.parameters()))
    fabric.backward(wrapped(torch.ones(2, 8)).sum())
    optimizer.step()
    here = [p.to_local().numel() for p in wrapped.parameters()]
    grads = [p.grad.to_local().numel() for p in wrapped.parameters()]
    state = [optimizer.state[p]["exp_avg"].to_local().numel() for p in wrapped.parameters()]
    return sum(here), sum(grads), sum(state), total


@pytest.mark.parametrize(
    "strategy", ["fsdp", "fsdp:policy=Linear", "fsdp:policy=Linear,reshard_after_forward=false"]
)
def test_each_of_two_processes_holds_half_of_everything(strategy):
    for *parts, total in run_ranks(2, held, strategy=strategy):
        assert parts == [total // 2] * 3


def test_copies_of_the_model_are_split_between_fewer():
    for *parts, total in run_ranks(4, held, strategy="fsdp:replicate=2"):
        assert parts == [total // 2] * 3


def wrapped_parts(fabric):
    from torch.distributed.fsdp import FSDPModule

    prepared = fabric.setup(model())
    return [name for name, each in prepared.module.named_modules() if isinstance(each, FSDPModule)]


def is_inner(module):
    return isinstance(module, nn.Sequential)


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        (None, [""]),
        ("Linear", ["", "0", "2.0"]),
        ("Linear+Sequential", ["", "0", "2", "2.0"]),
        (nn.Linear, ["", "0", "2.0"]),
        ((nn.Linear, nn.Tanh), ["", "0", "1", "2.0"]),
        (is_inner, ["", "2"]),
    ],
)
def test_the_policy_chooses_what_is_gathered_by_itself(policy, parts):
    assert run_ranks(1, wrapped_parts, strategy=FSDPStrategy(policy=policy)) == [parts]


def test_a_policy_that_chooses_nothing_lists_the_classes():
    with pytest.raises(RankFailed) as failed:
        run_ranks(1, wrapped_parts, strategy="fsdp:policy=Linaer")
    assert (
        "strategy 'fsdp' was given the policy 'Linaer', which chooses no part of Sequential; its "
        "modules are of the classes Linear, Sequential, Tanh"
    ) in str(failed.value)


@pytest.mark.parametrize("policy", [3, (), (nn.Linear, "Tanh")])
def test_a_policy_that_is_none(policy):
    with pytest.raises(InvalidRequest) as refused:
        FSDPStrategy(policy=policy)
    assert str(refused.value) == (
        f"strategy 'fsdp' was given policy={policy!r}; it takes names of classes joined by '+', "
        "such as policy=Block+Embedding, classes of modules, or a function of a module"
    )


def test_copies_that_do_not_divide_the_processes():
    with pytest.raises(RankFailed) as failed:
        run_ranks(4, wrapped_parts, strategy="fsdp:replicate=3")
    assert (
        "strategy 'fsdp' was given replicate=3, and the 4 processes of the run cannot be divided "
        "into 3 equal parts; write replicate=1, 2 or 4"
    ) in str(failed.value)
    with pytest.raises(InvalidRequest, match=r"^strategy 'fsdp' was given replicate=0; it counts"):
        FSDPStrategy(replicate=0)


def with_state(fabric):
    """An optimizer that has stepped before it was set up goes on."""
    plain = model()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    plain(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    wrapped, ready = fabric.setup(plain, optimizer)
    fabric.backward(wrapped(torch.ones(2, 8)).sum())
    ready.step()
    return [p.full_tensor().detach() for p in wrapped.parameters()]


def test_the_state_of_an_optimizer_comes_along():
    expected = model()
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        expected(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    for told in run_ranks(2, with_state, strategy="fsdp"):
        for mine, right in zip(told, expected.parameters(), strict=True):
            torch.testing.assert_close(mine, right.detach())


def made_after(fabric):
    """An optimizer of the parameters that setup_module left."""
    wrapped = fabric.setup_module(model())
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.1)
    optimizer = fabric.setup_optimizers(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(wrapped(torch.ones(2, 8)).sum())
        optimizer.step()
    return [p.full_tensor().detach() for p in wrapped.parameters()]


def test_an_optimizer_made_after_the_model_was_set_up():
    expected = model()
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        expected(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    for told in run_ranks(2, made_after, strategy="fsdp"):
        for mine, right in zip(told, expected.parameters(), strict=True):
            torch.testing.assert_close(mine, right.detach())


def without_parameters(fabric):
    return fabric.setup(nn.Tanh())(torch.zeros(2)).tolist()


def test_a_model_without_parameters():
    assert run_ranks(2, without_parameters, strategy="fsdp") == [[0.0, 0.0]] * 2


def overflows(fabric, check):
    plain = model()
    wrapped, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    fabric.backward(wrapped(torch.ones(2, 8)).sum() * float("inf"))
    norm = fabric.clip_gradients(wrapped, optimizer, max_norm=1.0, error_if_nonfinite=check)
    return type(norm), norm.item()


def test_a_norm_that_is_not_finite():
    with pytest.raises(RankFailed, match="pass error_if_nonfinite=False to go on all the same"):
        run_ranks(2, overflows, True, strategy="fsdp")
    for cls, norm in run_ranks(2, overflows, False, strategy="fsdp"):
        assert cls is torch.Tensor
        assert not torch.isfinite(torch.tensor(norm))


def asks_for_the_state(fabric):
    wrapped = fabric.setup(model())
    told = []
    for call in (wrapped.state_dict, lambda: wrapped.load_state_dict({})):
        with pytest.raises(Misuse) as refused:
            call()
        told.append(str(refused.value))
    return told


def test_the_parts_of_one_process_are_not_taken_for_the_model():
    words = (
        "model.{} was called, and with strategy 'fsdp' this process holds parts of the parameters "
        "alone; call fabric.{}(path, {{'model': model}}) in every process"
    )
    expected = [words.format("state_dict()", "save"), words.format("load_state_dict(…)", "load")]
    assert run_ranks(2, asks_for_the_state, strategy="fsdp") == [expected] * 2
