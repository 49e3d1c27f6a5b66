"""Which number formats parameters, computation, inputs and outputs have."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from torchweft import Fabric
from torchweft.builtin.precisions import BFloat16Mixed
from torchweft.errors import InvalidRequest, UnknownName

TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def make(precision: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision=precision)


class Spy(nn.Module):
    """Returns what it is given, and remembers what computation looked like inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, data: Any, **more: Any) -> Any:
        self.seen = (data, more)
        self.made = torch.ones(1).dtype
        self.computed = self.linear(torch.ones(2, 4)).dtype
        return data if not more else (data, more)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Batch:
    image: Tensor
    label: Tensor


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (None, "32-true"),
        (32, "32-true"),
        ("32", "32-true"),
        (64, "64-true"),
        ("64", "64-true"),
        ("bf16", "bf16-mixed"),
        (16, "16-mixed"),
        ("16", "16-mixed"),
        ("bf16-true", "bf16-true"),
        ("16-true", "16-true"),
    ],
)
def test_short_forms(written: Any, name: str) -> None:
    assert make(written).plan.precision.name == name


@pytest.mark.parametrize("written", [8, "8", "fp16"])
def test_an_unknown_precision_is_an_error(written: Any) -> None:
    with pytest.raises(UnknownName, match="no precision is called"):
        make(written)


@pytest.mark.parametrize("written", [True, 16.0, torch.float16])
def test_a_precision_is_named(written: Any) -> None:
    with pytest.raises(InvalidRequest, match="precision="):
        make(written)


# -- one dtype throughout ------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), TRUE.items())
def test_true_precisions_convert_module_input_and_output(
    precision: str, dtype: torch.dtype
) -> None:
    model = make(precision).setup(Spy())
    assert model.linear.weight.dtype == dtype
    assert model.scale.dtype == dtype
    assert model.count.dtype == torch.int64
    output = model(torch.ones(2, 4))
    assert model.seen[0].dtype == dtype
    assert model.made == dtype
    assert model.computed == dtype
    assert output.dtype == (dtype if precision == "64-true" else torch.float32)
    assert torch.get_default_dtype() == torch.float32


def test_outputs_come_back_in_the_default_dtype_of_the_user() -> None:
    model = make("bf16-true").setup(Spy())
    torch.set_default_dtype(torch.float64)
    try:
        assert model(torch.ones(2, 4)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_integers_and_whatever_else_is_no_float_is_left_alone() -> None:
    model = make("bf16-true").setup(Spy())
    indices, mask = torch.tensor([1, 2]), torch.tensor([True])
    output = model([indices, mask, "text", 3, 2.5, None])
    assert model.seen[0][0] is indices
    assert output[0] is indices
    assert output[1] is mask
    assert output[2:] == ["text", 3, 2.5, None]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_outputs_of_nested_types_are_converted_and_keep_their_types(precision: str) -> None:
    half = torch.ones(2, dtype=torch.bfloat16)
    given = {
        "list": [half, (half, 1)],
        "named": Pair(half, half.int()),
        "data": Batch(image=half, label=half.int()),
    }
    output = make(precision).setup(Spy())(given)
    assert output["list"][0].dtype == torch.float32
    assert output["list"][1][0].dtype == torch.float32
    assert output["list"][1][1] == 1
    assert type(output["named"]) is Pair
    assert output["named"].first.dtype == torch.float32
    assert output["named"].second.dtype == torch.int32
    assert type(output["data"]) is Batch
    assert output["data"].image.dtype == torch.float32
    assert output["data"].label.dtype == torch.int32
    assert half.dtype == torch.bfloat16


def test_keyword_inputs_are_converted() -> None:
    model = make("64-true").setup(Spy())
    model(torch.ones(2, 4), mask=torch.ones(2), deep={"x": [torch.ones(1)]})
    data, more = model.seen
    assert data.dtype == more["mask"].dtype == more["deep"]["x"][0].dtype == torch.float64


def test_training_in_64_bit_is_that_of_plain_torch_in_64_bit() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4, 1).double()
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    torch.manual_seed(0)
    fabric = make("64-true")
    model = nn.Linear(4, 1)
    model.load_state_dict(plain.state_dict())
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.1))
    data = torch.randn(8, 4)
    for _ in range(3):
        plain(data.double()).sum().backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        fabric.backward(model(data).sum())
        optimizer.step()
        optimizer.zero_grad()
    # The parameters given were 32-bit for a moment, as those of plain torch when they were made.
    assert torch.allclose(model.weight, plain.weight, rtol=0, atol=1e-12)
    assert model.weight.dtype == torch.float64
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float64


# -- autocast ------------------------------------------------------------------------------------


def test_mixed_precision_keeps_parameters_and_inputs_and_computes_in_bfloat16() -> None:
    model = make("bf16-mixed").setup(Spy())
    assert model.linear.weight.dtype == torch.float32
    given = torch.ones(2, 4)
    model(given)
    assert model.seen[0] is given
    assert model.computed == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_mixed_precision_nests_in_itself_and_ends_with_an_exception() -> None:
    fabric = make("bf16-mixed")
    inner = fabric.setup(nn.Linear(4, 4))

    class Outer(nn.Module):
        def forward(self, data: Tensor) -> Tensor:
            inside = inner(data)
            assert inside.dtype == torch.float32
            assert torch.is_autocast_enabled("cpu")
            assert nn.functional.linear(inside, torch.ones(4, 4)).dtype == torch.bfloat16
            if data.sum() < 0:
                raise KeyError("inside")
            return inside

    outer = fabric.setup(Outer())
    for _ in range(2):
        outer(torch.ones(2, 4))
        assert not torch.is_autocast_enabled("cpu")
        with pytest.raises(KeyError, match="inside"):
            outer(-torch.ones(2, 4))
        assert not torch.is_autocast_enabled("cpu")


def test_the_context_of_a_fabric_nests_in_itself() -> None:
    fabric = make("bf16-mixed")
    with fabric.autocast():
        with fabric.autocast():
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    with make("32-true").autocast():
        assert not torch.is_autocast_enabled("cpu")
    with make("64-true").autocast():
        assert torch.ones(1).dtype == torch.float64
    assert torch.ones(1).dtype == torch.float32


def test_threads_do_not_end_each_others_contexts() -> None:
    precision = BFloat16Mixed()
    precision.start(torch.device("cpu"))
    inside, leave = threading.Event(), threading.Event()
    seen: list[bool] = []

    def other() -> None:
        with precision.forward_context():
            inside.set()
            leave.wait(30)
            seen.append(torch.is_autocast_enabled("cpu"))
        seen.append(torch.is_autocast_enabled("cpu"))

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    with precision.forward_context():
        pass
    assert not torch.is_autocast_enabled("cpu")
    with precision.forward_context():
        leave.set()
        thread.join(30)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [True, False]


# -- the dtype of new modules --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [*TRUE.items(), ("32-true", torch.float32), ("bf16-mixed", torch.float32)],
)
def test_modules_and_tensors_are_made_in_the_dtype_of_parameters(
    precision: str, dtype: torch.dtype
) -> None:
    fabric = make(precision)
    with fabric.init_module():
        module = nn.Linear(2, 2)
    with fabric.init_tensor():
        tensor = torch.ones(2)
    assert module.weight.dtype == dtype
    assert tensor.dtype == dtype
    assert torch.ones(1).dtype == torch.float32
