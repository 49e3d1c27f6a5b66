"""Models made on the meta device, and filled with what they would have held."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchweft.api.deferred import Deferred, materialize
from torchweft.api.initialising import SkipInit, default_dtype
from torchweft.errors import InvalidRequest, Misuse
from torchweft.testing.interpreter import fresh_interpreter

CPU = torch.device("cpu")
GPT = runpy.run_path(str(Path(__file__).parents[2] / "examples/language_model/gpt.py"))["GPT"]


def everything(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def collected(deferred: Deferred, module: nn.Module) -> dict[str, Tensor]:
    """What ``settle`` was given, by every name."""
    values: dict[str, Tensor] = {}
    deferred.pending(module).fill(
        CPU, lambda names, whole: values.update(dict.fromkeys(names, whole.clone()))
    )
    return values


def same(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


class ByApply(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 8, padding_idx=2)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.token.weight
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.02)
            module.weight.data[2].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.fill_(1.0)


class ByInit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in [
            "xavier_uniform_",
            "xavier_normal_",
            "kaiming_uniform_",
            "kaiming_normal_",
            "orthogonal_",
            "eye_",
            "trunc_normal_",
            "normal_",
            "uniform_",
            "ones_",
            "zeros_",
        ]:
            weight = nn.Parameter(torch.empty(9, 7))
            getattr(nn.init, name)(weight)
            self.register_parameter(name, weight)
        self.sparse = nn.Parameter(nn.init.sparse_(torch.empty(9, 7), 0.3))
        self.dirac = nn.Parameter(nn.init.dirac_(torch.empty(6, 6, 3)))
        self.wide = nn.Parameter(nn.init.orthogonal_(torch.empty(3, 50)))
        self.narrow = nn.Parameter(nn.init.trunc_normal_(torch.empty(40, 5), 0.0, 1.0, 0.5, 3.0))


class Values(nn.Module):
    """Buffers and plain tensors from computation, from Python and from numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)).view(1, 1, 5, 5))
        frequencies = 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
        self.register_buffer("inv_freq", frequencies, persistent=False)
        angles = torch.outer(torch.arange(6).float(), frequencies)
        self.register_buffer("cis", torch.polar(torch.ones_like(angles), angles))
        self.register_buffer("conj", self.cis.conj())
        self.register_buffer("table", torch.tensor([1.5, 2.5]))
        self.register_buffer("shape", torch.as_tensor([1, 2, 3]))
        self.register_buffer("scaled", torch.tensor([1.5, 2.5]) * torch.rand(2))
        self.register_buffer("from_numpy", torch.from_numpy(np.arange(4.0)) * torch.rand(4))
        self.register_buffer("as_numpy", torch.as_tensor(np.arange(4)))
        self.register_buffer("listed", torch.tensor([torch.tensor(1.0), torch.ones(2).sum()]))
        self.register_buffer("like", self.table.new_tensor([3.0, 4.0]))
        self.register_buffer("placed", torch.tensor([7], device=self.table.device))
        self.register_buffer("picked", torch.arange(10)[[1, 3]])
        self.register_buffer("found", torch.arange(6)[torch.arange(6) % 2 == 0])
        self.register_buffer("one_hot", nn.functional.one_hot(torch.arange(3), 4))
        self.weight = nn.Parameter(torch.empty(3, 2))
        source = torch.arange(6.0, device="cpu").view(3, 2)
        with torch.no_grad():
            self.weight.copy_(source)
            source.zero_()
            self.weight[1] = 5.0
            self.weight[2, 0].mul_(2)
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 4)]
        self.pair = nn.Parameter(torch.stack([self.weight[0], torch.randn(2)]).detach())
        self.part = nn.Parameter(self.pair.data[1:])


class Dry(nn.Module):
    """Runs a part of itself, to learn the width of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.head = nn.Linear(self.body(torch.randn(2, 2, 7)).flatten(1).shape[1], 2)
        self.body(torch.randn(2, 2, 7))


class Attributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.tril(torch.ones(3, 3))
        self.list = [torch.arange(2), "x"]
        self.tuple = (torch.arange(3), torch.rand(2))
        self.dict = {"a": torch.ones(1), "b": 1}
        self.linear = nn.Linear(2, 2)
        self.held = [self.linear.weight]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 3),
    "convolution": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose1d(2, 2, 3)),
    "embedding": lambda: nn.Embedding(9, 20, padding_idx=3),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.BatchNorm2d(3), nn.GroupNorm(1, 4)),
    "lstm": lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3),
    "attention": lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
    "encoder": encoder,
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 8, batch_first=True),
    "copied": lambda: copy.deepcopy(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))),
    "by apply": ByApply,
    "example": lambda: GPT(17, 12, width=16, depth=2),
    "by init": ByInit,
    "values": Values,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "dry": Dry,
    "double": lambda: nn.Linear(3, 3, dtype=torch.float64).requires_grad_(False),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_what_construction_would_have_made(name: str) -> None:
    torch.manual_seed(1)
    expected = ARCHITECTURES[name]()
    after = torch.rand(3)
    deferred = Deferred()
    with deferred.recording():
        module = ARCHITECTURES[name]()
    assert [n for n, tensor in everything(module).items() if not tensor.is_meta] == []
    torch.manual_seed(1)
    same(collected(deferred, module), everything(expected))
    assert torch.equal(torch.rand(3), after)


def test_modules_that_are_cast_afterwards_are_known_by_their_parameters() -> None:
    torch.manual_seed(1)
    expected = nn.Sequential(encoder(), nn.BatchNorm1d(3)).to(torch.bfloat16)
    deferred = Deferred()
    with deferred.recording():
        module = nn.Sequential(encoder(), nn.BatchNorm1d(3))
    module.to(torch.bfloat16)
    torch.manual_seed(1)
    same(collected(deferred, module), everything(expected))


def test_the_default_dtype_is_that_of_the_recording() -> None:
    def made() -> nn.Module:
        module = GPT(17, 12, width=16, depth=2)
        module.register_buffer("quotient", torch.arange(3) / 2 * torch.tensor(1.5))
        return module

    torch.manual_seed(1)
    with default_dtype(torch.bfloat16):
        expected = made()
    deferred = Deferred()
    with deferred.recording(torch.bfloat16):
        module = made()
    assert torch.get_default_dtype() is torch.float32
    torch.manual_seed(1)
    same(collected(deferred, module), everything(expected))
    assert module.quotient.dtype is torch.bfloat16


def test_values_for_python_are_computed() -> None:
    deferred = Deferred()
    with deferred.recording():
        assert [x.item() for x in torch.linspace(0, 0.5, 3)] == [0.0, 0.25, 0.5]
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert torch.ones(2).sum() > 1
        assert torch.ones(2).numpy().tolist() == [1, 1]
        assert torch.equal(torch.ones(2), torch.full((2,), 1.0))
        assert torch.ones(2).cpu().device == CPU
        assert deferred.knows(torch.arange(3).nonzero())
        assert torch.zeros(1, device="cpu").device == CPU


def test_values_that_hang_on_random_numbers_are_refused() -> None:
    deferred = Deferred()
    with deferred.recording(), pytest.raises(Misuse) as refused:
        (torch.rand(1) * 2).item()
    assert str(refused.value) == (
        "a model made under fabric.init_module() asks for the value of a tensor in its "
        "constructor (torch.Tensor.item), and that hangs on random numbers, which are drawn "
        "later; make that tensor with device='cpu', or build the model without init_module()"
    )


def test_values_that_nobody_recorded_are_refused() -> None:
    elsewhere = torch.ones(1, device="meta")
    with Deferred().recording(), pytest.raises(Misuse, match="made on the meta device elsewhere"):
        elsewhere.item()


def test_errors_of_the_constructor_stay_what_they_are() -> None:
    with Deferred().recording():
        with pytest.raises(RuntimeError, match="broadcast"):
            torch.ones(2) + torch.ones(3)
        with pytest.raises(RuntimeError, match="must match the size"):
            torch.ones(2, device="cpu") + torch.ones(3, device="cpu")
        with pytest.raises(TypeError):
            torch.ones("2")  # type: ignore[call-overload]


def test_nothing_of_a_recording_is_left_behind() -> None:
    before = nn.init._no_grad_trunc_normal_
    with pytest.raises(ZeroDivisionError), Deferred().recording(torch.float64):
        1 / 0  # noqa: B018
    assert nn.init._no_grad_trunc_normal_ is before
    assert torch.get_default_dtype() is torch.float32
    assert nn.Linear(1, 1).weight.device == CPU


def test_recordings_may_be_nested() -> None:
    deferred = Deferred()
    with deferred.recording():
        with deferred.recording(torch.float64):
            inner = nn.Linear(2, 2)
        outer = nn.Linear(2, 2)
    assert (inner.weight.dtype, outer.weight.dtype) == (torch.float64, torch.float32)
    assert deferred.knows(inner.weight)
    assert deferred.knows(outer.weight)


# -- several models ------------------------------------------------------------------------------


def pair() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Two models and what is drawn for nobody, before, between and after them."""
    torch.rand(3)
    first = ByInit()
    torch.rand(3)
    gone = nn.Linear(3, 3)
    del gone
    second = ByApply()
    third = nn.LSTM(2, 2)
    torch.rand(5)
    return first, second, third


@pytest.mark.parametrize("contexts", [1, 2])
def test_models_are_filled_in_the_order_in_which_they_were_made(contexts: int) -> None:
    torch.manual_seed(1)
    expected = [*pair(), nn.Linear(2, 2)]
    after = torch.rand(3)
    deferred = Deferred()
    with deferred.recording():
        modules = [*pair(), *([nn.Linear(2, 2)] if contexts == 1 else [])]
    if contexts == 2:
        with deferred.recording():
            modules.append(nn.Linear(2, 2))
    torch.manual_seed(1)
    for module, like in zip(modules, expected, strict=True):
        same(collected(deferred, module), everything(like))
    assert torch.equal(torch.rand(3), after)


def test_a_later_model_may_be_filled_first() -> None:
    torch.manual_seed(1)
    first, second, _ = pair()
    deferred = Deferred()
    with deferred.recording():
        modules = pair()
    torch.manual_seed(1)
    same(collected(deferred, modules[1]), everything(second))
    values = collected(deferred, modules[0])
    assert set(values) == set(everything(first))
    assert not torch.equal(values["normal_"], everything(first)["normal_"])
    assert values["ones_"].eq(1).all()


def test_models_may_share_what_they_are_made_of() -> None:
    deferred = Deferred()
    with deferred.recording():
        mask = torch.tril(torch.ones(3, 3))
        shared = nn.Linear(3, 3)
        modules = [nn.Sequential(shared), nn.Sequential(shared)]
        for module in modules:
            module.register_buffer("mask", mask)
    for module in modules:
        materialize(module, CPU, deferred)
        assert module.mask.equal(torch.ones(3, 3).tril())
        assert module(torch.ones(1, 3)).isfinite().all()


# -- settling ------------------------------------------------------------------------------------


def test_tied_tensors_are_settled_once_by_all_of_their_names() -> None:
    deferred = Deferred()
    with deferred.recording():
        module = ByApply()
    pending = deferred.pending(module)
    assert ("token.weight", "head.weight") in pending.names
    settled: list[tuple[str, ...]] = []
    pending.fill(CPU, lambda names, whole: settled.append(names))
    assert sorted(settled) == sorted(pending.names)
    pending.fill(CPU, lambda names, whole: settled.append(names))
    assert len(settled) == len(pending.names)


def test_parameters_may_be_replaced_before_they_are_filled() -> None:
    torch.manual_seed(1)
    expected = ByApply()
    deferred = Deferred()
    with deferred.recording():
        module = ByApply()
    pending = deferred.pending(module)
    for layer in module.layers:
        layer.weight = nn.Parameter(torch.empty(4, 8))
    torch.manual_seed(1)
    values: dict[str, Tensor] = {}
    pending.fill(CPU, lambda names, whole: values.update({names[0]: whole}))
    assert torch.equal(values["layers.1.weight"], expected.layers[1].weight)


def test_plain_attributes_are_filled() -> None:
    torch.manual_seed(1)
    expected = Attributes()
    deferred = Deferred()
    with deferred.recording():
        module = Attributes()
    kept = module.list
    torch.manual_seed(1)
    materialize(module, CPU, deferred)
    assert torch.equal(module.mask, expected.mask)
    assert module.list is kept
    assert torch.equal(module.list[0], expected.list[0])
    assert torch.equal(module.tuple[1], expected.tuple[1])
    assert torch.equal(module.dict["a"], expected.dict["a"])
    assert module.held[0] is module.linear.weight


def test_memory_that_nobody_wrote_is_handed_out_as_it_is() -> None:
    deferred = Deferred()
    with deferred.recording(), SkipInit():
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        module.register_parameter("cut", nn.Parameter(torch.empty(3)))
        nn.init.trunc_normal_(module.cut)
        module.register_buffer("drawn", torch.rand(3))
    torch.manual_seed(1)
    values = collected(deferred, module)
    assert {name: value.shape for name, value in values.items()} == {
        name: value.shape for name, value in everything(module).items()
    }
    torch.manual_seed(1)
    assert torch.equal(values["drawn"], torch.rand(3))


def test_what_was_filled_is_forgotten() -> None:
    deferred = Deferred()
    with deferred.recording():
        module = Values()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    assert deferred._tape._operations
    materialize(module, CPU, deferred)
    assert not deferred._tape._operations
    assert not deferred._tape._storages
    assert optimizer.param_groups[0]["params"][0] is module.weight
    assert not deferred.pending(module).names


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_module_is_filled_in_place(name: str) -> None:
    torch.manual_seed(1)
    expected = everything(ARCHITECTURES[name]())
    deferred = Deferred()
    with deferred.recording():
        module = ARCHITECTURES[name]()
    before = everything(module)
    torch.manual_seed(1)
    materialize(module, CPU, deferred)
    after = everything(module)
    same(after, expected)
    for key, tensor in after.items():
        assert tensor is before[key]
        assert tensor.requires_grad == expected[key].requires_grad
        assert tensor.is_leaf
        assert isinstance(tensor, nn.Parameter) is isinstance(expected[key], nn.Parameter)


def test_a_module_filled_in_place_trains() -> None:
    deferred = Deferred()
    with deferred.recording():
        module = nn.Sequential(nn.LSTM(2, 3))
        optimizer = torch.optim.Adam(module.parameters())
    materialize(module, CPU, deferred)
    before = module[0].weight_ih_l0.detach().clone()
    module(torch.ones(4, 2))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(module[0].weight_ih_l0, before)


# -- by reset_parameters -------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(3))
        self.shift = nn.Parameter(torch.empty(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Half(Own):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)


def test_a_model_made_on_the_meta_device_is_reset() -> None:
    torch.manual_seed(1)
    expected = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(4, 2, 1))
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(4, 2, 1))
    before = everything(module)
    torch.manual_seed(1)
    materialize(module, CPU)
    same(everything(module), everything(expected))
    assert all(tensor is before[name] for name, tensor in everything(module).items())


def test_tied_parameters_are_reset_once() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
        module[1].weight = module[0].weight
    assert list(Deferred().pending(module).names) == [("0.weight", "1.weight")]
    materialize(module, CPU)
    assert module[1].weight is module[0].weight
    assert module[0].weight.isfinite().all()


def test_reset_leaves_alone_what_is_real() -> None:
    module = nn.Linear(3, 3)
    real = module.bias.detach().clone()
    module.weight = nn.Parameter(module.weight.to("meta"))
    materialize(module, CPU)
    assert torch.equal(module.bias, real)
    assert module.weight.isfinite().all()


def test_copies_of_what_was_made_on_the_meta_device_are_reset() -> None:
    elsewhere = nn.Linear(3, 3, device="meta")
    deferred = Deferred()
    with deferred.recording():
        module = nn.Sequential(nn.Linear(3, 3), copy.deepcopy(elsewhere))
    assert not deferred.knows(module[1].weight)
    materialize(module, CPU, deferred)
    assert all(tensor.isfinite().all() for tensor in everything(module).values())


def test_attention_is_reset_by_the_method_of_its_own() -> None:
    with torch.device("meta"):
        module = nn.TransformerEncoderLayer(8, 2, 8)
    materialize(module, CPU)
    assert all(tensor.isfinite().all() for tensor in everything(module).values())


def test_a_module_that_cannot_be_reset_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 3), Own())
    with pytest.raises(InvalidRequest) as refused:
        Deferred().pending(module)
    assert str(refused.value) == (
        "1 (Own) was made on the meta device and cannot be filled: it has no reset_parameters() "
        "to fill 'scale', 'shift'; build the model under fabric.init_module(), or give the class "
        "that method"
    )


def test_a_module_that_resets_a_part_of_itself_is_refused() -> None:
    with torch.device("meta"):
        module = Half()
    before = everything(module)
    with pytest.raises(InvalidRequest) as refused:
        materialize(module, CPU)
    assert str(refused.value) == (
        "the model (Half) was made on the meta device and cannot be filled: its "
        "reset_parameters() leaves 'shift' as memory was; build the model under "
        "fabric.init_module(), or let that method fill it"
    )
    assert all(tensor is before[name] for name, tensor in everything(module).items())


# -- memory --------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
import torch
from torch import nn
from torchweft.api.deferred import Deferred

# Each more than malloc takes from the heap, where small ones in between would keep it.
WIDTH, DEPTH = 3072, 16

class Deep(nn.Module):
    def __init__(self, again):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        if again:
            self.apply(self.init)

    def init(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.02)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

deferred = Deferred()
with deferred.recording():
    nn.Linear(8, 8)
    model = Deep(sys.argv[1] == "again")
shares = []
warm = torch.empty(8, 8).normal_() @ torch.ones(8, 8)
before = peak()
deferred.pending(model).fill(
    torch.device("cpu"), lambda names, whole: shares.append(whole[:2].clone())
)
print(len(shares), (peak() - before) / (WIDTH * WIDTH * 4))
"""


def test_no_compiler_is_imported_for_it() -> None:
    done = fresh_interpreter(
        """
        import sys, torch
        from torch import nn
        from torchweft.api.deferred import Deferred, materialize

        deferred = Deferred()
        with deferred.recording():
            model = nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
        materialize(model, torch.device("cpu"), deferred)
        print("torch._dynamo" in sys.modules)
        """
    )
    assert (done.status, done.out) == (0, "False\n"), done.err


@pytest.mark.parametrize("how", ["once", "again"])
def test_no_more_is_held_than_the_constructor_works_on(how: str) -> None:
    done = fresh_interpreter(MEASURE, how)
    assert done.status == 0, done.err
    settled, tensors = done.out.split()
    # Of 16, in multiples of one of them.
    assert int(settled) == 16
    assert float(tensors) < 2
