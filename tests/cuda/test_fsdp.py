"""Strategy ``fsdp``: what each process holds, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

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
        "strategy 'fsdp' was given policy=Linaer, which chooses no part of Sequential; did you "
        "mean 'Linear'? its modules are of the classes Linear, Sequential, Tanh"
    ) in str(failed.value)


def test_copies_that_do_not_divide_the_processes():
    # An object says its options to nobody before it is started.
    with pytest.raises(RankFailed) as failed:
        run_ranks(4, wrapped_parts, strategy=FSDPStrategy(replicate=3))
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


# -- number formats --------------------------------------------------------------------------------


SEEN = {}


class Layer(nn.Linear):
    def forward(self, x):
        output = super().forward(x)
        SEEN.update(gathered=self.weight.dtype, computed=output.dtype)
        return output


class Norm(nn.BatchNorm1d):
    def forward(self, x):
        SEEN["norm"] = self.weight.dtype
        return super().forward(x)


def formats(fabric):
    """The dtypes of parameters, gathered parameters, what a part computes, outputs, gradients."""
    plain = nn.Sequential(Layer(8, 8), Norm(8), nn.Linear(8, 4))
    model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    seen = {"held": model[0].weight.dtype}
    output = model(torch.ones(4, 8))
    seen["output"] = output.dtype
    fabric.backward(output.square().mean())
    seen["gradient"] = model[0].weight.grad.dtype
    optimizer.step()
    seen.update(SEEN)
    return {name: str(dtype).removeprefix("torch.") for name, dtype in seen.items()}


@pytest.mark.parametrize(
    ("precision", "held", "gathered"),
    [
        ("32-true", "float32", "float32"),
        ("bf16-mixed", "float32", "bfloat16"),
        ("16-mixed", "float32", "float16"),
        ("bf16-true", "bfloat16", "bfloat16"),
        ("16-true", "float16", "float16"),
    ],
)
def test_parameters_are_gathered_in_the_precision(precision, held, gathered):
    (told,) = run_ranks(1, formats, strategy="fsdp:policy=Layer", precision=precision)
    assert told == {
        "held": held,
        "gathered": gathered,
        "computed": gathered,
        # Running statistics are in 32-bit where parameters are.
        "norm": held,
        "output": "float32",
        "gradient": held,
    }


def test_number_formats_of_ones_own():
    strategy = FSDPStrategy(
        policy=Layer, mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    )
    (told,) = run_ranks(1, formats, strategy=strategy)
    assert (told["held"], told["gathered"], told["output"]) == ("float32", "bfloat16", "bfloat16")
    with pytest.raises(RankFailed) as failed:
        run_ranks(1, formats, strategy=strategy, precision="bf16-mixed")
    assert (
        "precision 'bf16-mixed' and the mixed_precision= of strategy 'fsdp' both say in which "
        "dtype parameters are gathered; leave one of them out"
    ) in str(failed.value)
    with pytest.raises(InvalidRequest) as refused:
        FSDPStrategy(mixed_precision="bfloat16")
    assert str(refused.value) == (
        "strategy 'fsdp' was given mixed_precision='bfloat16'; it takes a "
        "torch.distributed.fsdp.MixedPrecisionPolicy, and precision='bf16-mixed' says the usual"
    )


def overflow_in_one_rank(fabric):
    plain = model()
    wrapped, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    before = [p.full_tensor().clone() for p in wrapped.parameters()]
    fabric.backward(wrapped(torch.ones(2, 8)).sum())
    if fabric.global_rank == 0:
        next(iter(wrapped.parameters())).grad.to_local().fill_(float("inf"))
    optimizer.step()
    after = [p.full_tensor() for p in wrapped.parameters()]
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_overflow_in_one_process_skips_the_step_in_all():
    told = run_ranks(2, overflow_in_one_rank, strategy="fsdp", precision="16-mixed:init_scale=8")
    assert told == [True, True]


# -- memory for time -------------------------------------------------------------------------------


class Counting(nn.Linear):
    """Counts its forward passes."""

    passes = 0

    def forward(self, x):
        Counting.passes += 1
        return torch.tanh(super().forward(x))


def passes(fabric):
    wrapped = fabric.setup(nn.Sequential(Counting(8, 8), nn.Linear(8, 4)))
    names = list(dict(wrapped.named_parameters()))
    fabric.backward(wrapped(torch.ones(2, 8)).sum())
    return Counting.passes, names


@pytest.mark.parametrize(("option", "times"), [("", 1), (",activation_checkpointing=Counting", 2)])
def test_activations_are_computed_again(option, times):
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    told = run_ranks(2, passes, strategy=f"fsdp:policy=Counting{option}")
    assert told == [(times, names)] * 2


def compiled(fabric):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    wrapped = fabric.setup(plain)
    output = wrapped(torch.ones(2, 8))
    fabric.backward(output.sum())
    by_part = [each._compiled_call_impl is not None for each in plain]
    return by_part, plain._compiled_call_impl is not None, output.detach()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(None, ([False] * 3, True)), (nn.Linear, ([True, False, True], False))],
)
def test_each_part_is_compiled_by_itself(policy, expected):
    strategy = FSDPStrategy(policy=policy, compile={"backend": "aot_eager"})
    torch.manual_seed(0)
    right = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))(torch.ones(2, 8))
    for *found, output in run_ranks(2, compiled, strategy=strategy):
        assert tuple(found) == expected
        torch.testing.assert_close(output, right.detach())


@pytest.mark.parametrize("value", ["maybe", 1, None])
def test_what_says_nothing_of_compiling(value):
    with pytest.raises(InvalidRequest) as refused:
        FSDPStrategy(compile=value)
    assert str(refused.value) == (
        f"strategy 'fsdp' was given compile={value!r}; it takes true, false, or a dict with "
        "arguments of torch.compile"
    )


def offloads(fabric):
    policy = fabric.strategy._shard_options["offload_policy"]
    return isinstance(policy, CPUOffloadPolicy), policy.pin_memory, held(fabric)


def test_the_host_keeps_what_is_not_computed_with():
    # On processes of the CPU it is there anyway; what goes the same way as on a GPU is the code.
    for is_offload, pins, (*parts, total) in run_ranks(2, offloads, strategy="fsdp_cpu_offload"):
        assert (is_offload, pins) == (True, False)
        assert parts == [total // 2] * 3


def changes_what_it_gets(fabric, policy):
    # Of inputs with three dimensions a linear layer returns a view.
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    wrapped = fabric.setup(plain)
    output = wrapped(torch.ones(2, 3, 8))
    output += 1


@pytest.mark.parametrize("policy", ["", ":policy=Linear"], ids=["the whole", "a part"])
def test_an_output_that_would_be_changed_unnoticed_is_refused(policy):
    with pytest.raises(RankFailed, match="is a view and is being modified inplace"):
        run_ranks(1, changes_what_it_gets, policy, strategy=f"fsdp{policy}")


def returns_a_view(fabric):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = fabric.setup(nn.Sequential(nn.Linear(8, 4)))
        fabric.backward(wrapped(torch.ones(2, 3, 8)).sum())
    return [str(each.message) for each in caught], wrapped[0].weight.grad is not None


def test_a_view_is_nothing_to_warn_of():
    assert run_ranks(2, returns_a_view, strategy="fsdp:policy=Linear") == [([], True)] * 2


class Again(nn.Sequential):
    def forward_again(self, x):
        return self.forward(x)


def evaluates(fabric):
    wrapped = fabric.setup(Again(nn.Linear(8, 4)))
    wrapped.mark_forward_method("forward_again")
    told = []
    for call in (wrapped, wrapped.forward_again):
        with torch.no_grad():
            call(torch.ones(2, 8))
        told.append(all(hasattr(p, "to_local") for p in wrapped.parameters()))
    # What the backward pass needs at once is kept for it.
    wrapped(torch.ones(2, 8))
    return [*told, all(hasattr(p, "to_local") for p in wrapped.parameters())]


def test_nothing_stays_gathered_after_evaluation():
    assert run_ranks(2, evaluates, strategy="fsdp") == [[True, True, False]] * 2


class Remembers(nn.Module):
    """Adds a buffer that each rank changes in its own way."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        return self.layer(x) * 0 + self.last

    def step(self, x):
        return self.forward(x)


def buffers_of(fabric):
    wrapped = fabric.setup(Remembers())
    wrapped.mark_forward_method("step")
    told = []
    for call in (wrapped, wrapped.step):
        wrapped.last.fill_(1.0 + fabric.global_rank)
        told.append(call(torch.ones(1, 2)).mean().item())
    return told


@pytest.mark.parametrize(("option", "second"), [("", 1.0), (":broadcast_buffers=false", 2.0)])
def test_every_forward_pass_starts_from_the_buffers_of_rank_0(option, second):
    assert run_ranks(2, buffers_of, strategy=f"fsdp{option}") == [[1.0, 1.0], [second, second]]


def norms(fabric, order):
    plain = model()
    wrapped, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    fabric.backward(wrapped(torch.ones(2, 8)).sum())
    return fabric.clip_gradients(wrapped, optimizer, max_norm=1e9, norm_type=order).item()


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, float("inf")])
def test_norms_of_every_order(order):
    plain = model()
    plain(torch.ones(2, 8)).sum().backward()
    right = nn.utils.clip_grad_norm_(plain.parameters(), 1e9, norm_type=order).item()
    for told in run_ranks(2, norms, order, strategy="fsdp"):
        assert told == pytest.approx(right, rel=1e-5)


def dimensions(fabric):
    return list(fabric.mesh.mesh_dim_names), list(fabric.mesh.shape), fabric.num_replicas


def test_the_mesh_has_names():
    told = run_ranks(4, dimensions, strategy="fsdp:replicate=2")
    assert told == [(["replicate", "shard"], [2, 2], 4)] * 4
    with pytest.raises(RankFailed) as failed:
        run_ranks(1, dimensions, strategy="ddp")
    assert (
        "fabric.mesh was read, but strategy 'ddp' arranges its processes in no mesh; "
        "fabric.world_size and fabric.global_rank count them"
    ) in str(failed.value)
