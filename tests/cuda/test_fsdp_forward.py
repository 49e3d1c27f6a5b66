"""Strategy ``fsdp``: what surrounds a forward pass, and what is computed a second time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchweft.errors import RankFailed
from torchweft.testing import run_ranks
from torchweft_cuda.fsdp import FSDPStrategy


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        # Whatever is made in a forward pass has the precision's dtype.
        return x + torch.tanh(self.layer(x)) * torch.ones(8)


def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 4))


def stepped(fabric, before=None):
    """The parameters after three steps."""
    wrapped, optimizer = fabric.setup(*with_optimizer(model()))
    if before is not None:
        before(wrapped)
    for _ in range(3):
        fabric.backward(wrapped(torch.ones(2, 8)).float().square().sum())
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in parts(wrapped)]


def parts(wrapped):
    return [p.detach() for p in wrapped.parameters()]


def with_optimizer(plain):
    return plain, torch.optim.SGD(plain.parameters(), lr=0.05)


@pytest.fixture(scope="module")
def right():
    (told,) = run_ranks(1, stepped, strategy="single_device")
    return told


@pytest.mark.parametrize(
    "options",
    [
        {"compile": {"backend": "aot_eager"}},
        {"compile": {"backend": "aot_eager"}, "activation_checkpointing": Block},
        {"activation_checkpointing": "Block"},
        {"cpu_offload": True},
        {"reshard_after_forward": False},
    ],
    ids=["compiled", "compiled and again", "again", "on the host", "kept"],
)
def test_it_trains_as_one_process_does(right, options):
    for told in run_ranks(2, stepped, strategy=FSDPStrategy(policy=Block, **options)):
        torch.testing.assert_close(told, right)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_what_is_computed_again_has_the_same_dtype(precision):
    strategy = FSDPStrategy(policy=Block, activation_checkpointing=Block)
    plain = FSDPStrategy(policy=Block)
    again = run_ranks(1, stepped, strategy=strategy, precision=precision)
    torch.testing.assert_close(again, run_ranks(1, stepped, strategy=plain, precision=precision))


def in_inference_mode(wrapped):
    with torch.inference_mode():
        wrapped(torch.ones(2, 8))


def trains_after(fabric):
    return stepped(fabric, in_inference_mode)


@pytest.mark.parametrize("option", ["", ":policy=Block"])
def test_inference_mode_leaves_nothing_behind(right, option):
    for told in run_ranks(2, trains_after, strategy=f"fsdp{option}"):
        torch.testing.assert_close(told, right)


def optimizer_made_late(fabric, evaluates):
    wrapped = fabric.setup_module(model())
    with torch.set_grad_enabled(not evaluates):
        wrapped(torch.ones(2, 8))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(wrapped.parameters(), lr=0.05))
    for _ in range(3):
        fabric.backward(wrapped(torch.ones(2, 8)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() for p in parts(wrapped)]


@pytest.mark.parametrize("evaluates", [True, False])
@pytest.mark.parametrize("option", ["", ":policy=Block,reshard_after_forward=false"])
def test_an_optimizer_made_after_a_forward_pass(right, option, evaluates):
    for told in run_ranks(2, optimizer_made_late, evaluates, strategy=f"fsdp{option}"):
        torch.testing.assert_close(told, right)


def saves_after_evaluation(fabric, path):
    wrapped, optimizer = fabric.setup(*with_optimizer(model()))
    fabric.backward(wrapped(torch.ones(2, 8)).sum())
    optimizer.step()
    with torch.no_grad():
        wrapped(torch.ones(2, 8))
    wrapped(torch.ones(2, 8))  # whose loss nobody wants
    fabric.save(path, {"optimizer": optimizer, "model": wrapped})
    fabric.load(path, {"optimizer": optimizer, "model": wrapped})


@pytest.mark.parametrize(
    ("ranks", "option"),
    [
        (2, ""),
        (2, ":policy=Block,reshard_after_forward=false"),
        (4, ":policy=Block,reshard_after_forward=2"),
    ],
)
def test_what_is_gathered_is_freed_before_a_checkpoint(tmp_path, ranks, option):
    run_ranks(ranks, saves_after_evaluation, tmp_path / "x.ckpt", strategy=f"fsdp{option}")


class Statistic(nn.Module):
    """Computes with a buffer that the backward pass needs, one of a dtype that gloo has not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 2.0))
        self.register_buffer("count", torch.ones(3, dtype=torch.int16))

    def forward(self, x):
        return self.layer(x) * self.scale


def two_passes(fabric):
    wrapped = fabric.setup(Statistic())
    if fabric.global_rank:
        wrapped.count.fill_(7)
    first, second = wrapped(torch.ones(2, 8)), wrapped(torch.zeros(2, 8))
    fabric.backward(first.sum() + second.sum())
    return wrapped.count.tolist()


def test_buffers_travel_between_two_passes():
    assert run_ranks(2, two_passes, strategy="fsdp") == [[1, 1, 1]] * 2


class Marked(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.bias.no_decay = True


def marks(fabric):
    return fabric.setup(Marked()).bias.no_decay


def test_attributes_of_parameters_come_along():
    assert run_ranks(1, marks, strategy="fsdp") == [True]


def set_up_twice(fabric):
    trunk = nn.Linear(8, 8)
    fabric.setup(nn.Sequential(trunk, nn.Linear(8, 2)))
    fabric.setup(nn.Sequential(trunk, nn.Linear(8, 3)))


def test_a_parameter_of_two_models_is_refused():
    with pytest.raises(RankFailed) as failed:
        run_ranks(1, set_up_twice, strategy="fsdp")
    assert (
        "'0.weight' of Sequential was set up with another model already, and a parameter cannot be "
        "sharded twice; set up one module that holds both models"
    ) in str(failed.value)


def norm_of_large(fabric):
    plain = nn.Linear(8, 8, bias=False)
    wrapped, optimizer = fabric.setup(*with_optimizer(plain))
    fabric.backward(wrapped(torch.full((1, 8), 2000.0)).sum())
    return fabric.clip_gradients(wrapped, optimizer, max_norm=1.0).item()


def test_norms_are_computed_in_32_bits():
    for told in run_ranks(2, norm_of_large, strategy="fsdp", precision="16-true"):
        assert told == pytest.approx(16000.0, rel=1e-3)


def attention(fabric):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    wrapped = fabric.setup(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    fabric.backward(wrapped(torch.ones(2, 3, 8)).sum())
    return True


def test_parts_by_size_train():
    assert run_ranks(2, attention, strategy="fsdp:policy=auto") == [True, True]


def limits(fabric):
    return [
        str(fabric.mesh.get_group(name)._get_backend(fabric.device).options._timeout)
        for name in fabric.mesh.mesh_dim_names
    ]


def test_a_limit_of_time_holds_in_every_group():
    told = run_ranks(4, limits, strategy="fsdp:replicate=2,timeout=7")
    assert told == [["0:00:07", "0:00:07"]] * 4
