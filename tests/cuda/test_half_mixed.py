"""Float16 with a loss scaler: on the CPU, on two processes, and on a GPU."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import StepLR

from torchweft import Fabric
from torchweft.errors import IncompatiblePlan, Misuse, UnknownOption
from torchweft_cuda.half_mixed import HalfMixed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


#: torch's first scale, 65536, is itself more than float16 holds: training begins with overflows.
SCALE = 1024.0


def make(accelerator: str = "cpu", **options: Any) -> Fabric:
    precision = HalfMixed(**{"init_scale": SCALE, **options})
    return Fabric(accelerator=accelerator, devices=1, precision=precision)


def set_up(fabric: Fabric, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    made: tuple[Any, Any] = fabric.setup(net, SGD(net.parameters(), lr=0.1, **options))
    return made


def loss_of(fabric: Fabric, model: Any, factor: float = 1.0) -> Tensor:
    loss: Tensor = model(fabric.to_device(torch.ones(4, 2))).mean() * factor
    return loss


def overflow(fabric: Fabric, model: Any) -> None:
    fabric.backward(loss_of(fabric, model, float("inf")))


def scale(fabric: Fabric) -> float:
    return float(fabric.precision.state_dict()["scale"])


# -- what it computes in -------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", DEVICES)
def test_it_computes_in_float16_and_keeps_parameters_in_32_bit(accelerator: str) -> None:
    seen = []

    class Spy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            output = super().forward(input)
            seen.append((input.dtype, output.dtype))
            return output

    fabric = make(accelerator)
    model = fabric.setup(Spy(2, 2))
    output = model(fabric.to_device(torch.ones(1, 2)))
    assert seen == [(torch.float32, torch.float16)]
    assert output.dtype == torch.float32
    assert model.weight.dtype == torch.float32


def test_options_are_written_behind_the_name() -> None:
    plain = Fabric(accelerator="cpu", precision="16-mixed")
    plain.launch()
    assert scale(plain) == 65536.0
    fabric = Fabric(accelerator="cpu", precision="16-mixed:init_scale=1024,growth_interval=3")
    fabric.launch()
    assert scale(fabric) == 1024.0
    assert fabric.precision.state_dict()["growth_interval"] == 3
    with pytest.raises(UnknownOption, match=r"did you mean 'init_scale'\?"):
        Fabric(accelerator="cpu", precision="16-mixed:initial_scale=3")


# -- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", DEVICES)
def test_training_comes_close_to_training_in_32_bit(accelerator: str) -> None:
    plain = nn.Linear(2, 1)
    model = copy.deepcopy(plain)
    plain_optimizer = Adam(plain.parameters(), lr=0.05)
    fabric = make(accelerator)
    model, optimizer = fabric.setup(model, Adam(model.parameters(), lr=0.05))
    data = torch.randn(16, 2)
    for _ in range(10):
        plain_optimizer.zero_grad()
        plain(data).square().mean().backward()
        plain_optimizer.step()
        optimizer.zero_grad()
        fabric.backward(model(fabric.to_device(data)).square().mean())
        assert model.weight.grad.abs().max() > 10
        optimizer.step()
    assert torch.allclose(model.weight.cpu(), plain.weight, atol=0.02)
    assert scale(fabric) == SCALE


@pytest.mark.parametrize("accelerator", DEVICES)
def test_an_overflow_skips_the_step_and_halves_the_scale(accelerator: str) -> None:
    fabric = make(accelerator)
    model, optimizer = set_up(fabric)
    before = model.weight.detach().clone()
    overflow(fabric, model)
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert scale(fabric) == SCALE / 2
    optimizer.zero_grad()
    fabric.backward(loss_of(fabric, model))
    optimizer.step()
    assert torch.allclose(model.weight, before - 0.1, atol=1e-3)
    assert scale(fabric) == SCALE / 2


def test_the_scale_grows_after_good_steps() -> None:
    fabric = make(init_scale=8.0, growth_interval=2)
    model, optimizer = set_up(fabric)
    scales = []
    for _ in range(5):
        optimizer.zero_grad()
        fabric.backward(loss_of(fabric, model))
        # The gradient is that of the loss times the scale at that time.
        scales.append(model.bias.grad.item())
        optimizer.step()
    assert scales == [8.0, 8.0, 16.0, 16.0, 32.0]


def test_gradients_are_accumulated_at_one_scale() -> None:
    fabric = make()
    model, optimizer = set_up(fabric)
    before = model.bias.detach().clone()
    for _ in range(3):
        fabric.backward(loss_of(fabric, model))
    optimizer.step()
    assert torch.allclose(model.bias, before - 0.3)


def test_a_step_without_gradients_is_torchs() -> None:
    fabric = make()
    model, optimizer = set_up(fabric)
    before = model.weight.detach().clone()
    optimizer.step()
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    assert torch.equal(model.weight, before)
    fabric.backward(loss_of(fabric, model))
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_a_closure_is_an_error_that_says_what_to_use() -> None:
    fabric = make()
    net = nn.Linear(2, 1)
    _, optimizer = fabric.setup(net, LBFGS(net.parameters()))
    with pytest.raises(
        IncompatiblePlan,
        match=r"^precision '16-mixed' scales the loss and may skip a step, which an optimizer that "
        r"calls a closure does not allow; use precision='bf16-mixed' or '32-true'$",
    ):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("made", ["before", "after"])
def test_a_scheduler_takes_a_skipped_step_for_a_step(made: str) -> None:
    fabric = make()
    net = nn.Linear(2, 1)
    original = SGD(net.parameters(), lr=1.0)
    scheduler = StepLR(original, 1, 0.5) if made == "before" else None
    model, optimizer = fabric.setup(net, original)
    scheduler = scheduler or StepLR(optimizer, 1, 0.5)
    overflow(fabric, model)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    fabric.backward(loss_of(fabric, model))
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


# -- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", DEVICES)
def test_clipping_sees_true_gradients_and_unscales_once(accelerator: str) -> None:
    fabric = make(accelerator)
    model, optimizer = set_up(fabric)
    before = model.bias.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(loss_of(fabric, model))
        norm = fabric.clip_gradients(model, optimizer, max_norm=100.0)
        assert norm is not None
        assert norm.device == fabric.device
        assert torch.isclose(norm.cpu(), torch.tensor(3.0).sqrt(), rtol=1e-3)
        again = fabric.clip_gradients(model, optimizer, max_norm=100.0)
        assert torch.equal(norm, again)  # type: ignore[arg-type]
        assert fabric.clip_gradients(model, optimizer, clip_val=0.5) is None
        optimizer.step()
    assert torch.allclose(model.bias, before - 2 * 0.05, atol=1e-4)


def test_an_overflow_does_not_stop_the_clipping() -> None:
    fabric = make()
    model, optimizer = set_up(fabric)
    before = model.weight.detach().clone()
    overflow(fabric, model)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
    assert norm is not None
    assert not norm.isfinite()
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert scale(fabric) == SCALE / 2
    overflow(fabric, model)
    with pytest.raises(RuntimeError, match="non-finite"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=True)


def test_clipping_in_the_middle_of_accumulation_is_an_error() -> None:
    fabric = make()
    model, optimizer = set_up(fabric)
    fabric.backward(loss_of(fabric, model))
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    fabric.backward(loss_of(fabric, model))
    with pytest.raises(
        Misuse,
        match=r"^fabric.clip_gradients\(\) was called again before optimizer.step\(\), with "
        r"fabric.backward\(\) in between, .* clip once, after the last fabric.backward\(\) and "
        r"right before optimizer.step\(\), or leave the step out by optimizer.zero_grad\(\)$",
    ):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_may_be_left_out_after_clipping(set_to_none: bool) -> None:
    fabric = make()
    model, optimizer = set_up(fabric)
    before = model.bias.detach().clone()
    overflow(fabric, model)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.zero_grad(set_to_none=set_to_none)
    fabric.backward(loss_of(fabric, model))
    assert scale(fabric) == SCALE / 2
    norm = fabric.clip_gradients(model, optimizer, max_norm=100.0)
    assert torch.isclose(norm, torch.tensor(3.0).sqrt(), rtol=1e-3)  # type: ignore[arg-type]
    optimizer.step()
    assert torch.allclose(model.bias, before - 0.1, atol=1e-4)


# -- several optimizers --------------------------------------------------------------------------


def two_models(fabric: Fabric) -> tuple[Any, Any, Any, Any]:
    return (*set_up(fabric), *set_up(fabric))


@pytest.mark.parametrize("clip", [True, False])
def test_one_of_two_optimizers_overflows(clip: bool) -> None:
    """The other one's step is made, with gradients that are divided once by their scale."""
    fabric = make(growth_interval=1)
    one, first, two, second = two_models(fabric)
    before = one.bias.detach().clone()
    overflow(fabric, one)
    fabric.backward(loss_of(fabric, two))
    if clip:
        fabric.clip_gradients(one, first, max_norm=100.0)
        fabric.clip_gradients(two, second, max_norm=100.0)
    first.step()
    second.step()
    assert torch.equal(one.bias, before)
    assert torch.allclose(two.bias, before - 0.1, atol=1e-4)
    assert scale(fabric) == SCALE / 2


def test_two_optimizers_in_turn() -> None:
    fabric = make(init_scale=8.0, growth_interval=2)
    one, first, two, second = two_models(fabric)
    before = one.bias.detach().clone()
    for _ in range(3):
        for model, optimizer in ((one, first), (two, second)):
            optimizer.zero_grad()
            fabric.backward(loss_of(fabric, model))
            fabric.clip_gradients(model, optimizer, max_norm=100.0)
            optimizer.step()
    assert torch.allclose(one.bias, before - 0.3, atol=1e-4)
    assert torch.allclose(two.bias, before - 0.3, atol=1e-4)
    assert scale(fabric) == 64.0


def test_an_optimizer_that_waits_clipped_keeps_its_scale() -> None:
    fabric = make()
    one, first, two, second = two_models(fabric)
    before = one.bias.detach().clone()
    fabric.backward(loss_of(fabric, one))
    fabric.clip_gradients(one, first, max_norm=100.0)
    overflow(fabric, two)
    second.step()
    fabric.backward(loss_of(fabric, two))
    first.step()
    assert torch.allclose(one.bias, before - 0.1, atol=1e-4)


# -- state ---------------------------------------------------------------------------------------


def test_the_scale_is_saved_and_restored(tmp_path: Path) -> None:
    fabric = make()
    model, optimizer = set_up(fabric)
    overflow(fabric, model)
    optimizer.step()
    optimizer.zero_grad()
    fabric.backward(loss_of(fabric, model))
    optimizer.step()
    path = tmp_path / "x.ckpt"
    fabric.save(path, {"model": model, "optimizer": optimizer})
    saved = fabric.precision.state_dict()
    assert (saved["scale"], saved["_growth_tracker"]) == (SCALE / 2, 1)

    other = make()
    other_model, other_optimizer = set_up(other)
    overflow(other, other_model)
    other_optimizer.step()
    other_optimizer.zero_grad()
    other.load(path, {"model": other_model, "optimizer": other_optimizer})
    assert other.precision.state_dict() == saved
    for one, its_model, its_optimizer in (
        (fabric, model, optimizer),
        (other, other_model, other_optimizer),
    ):
        its_optimizer.zero_grad()
        one.backward(loss_of(one, its_model))
        its_optimizer.step()
    assert torch.equal(model.weight, other_model.weight)


def test_a_checkpoint_of_another_precision_changes_nothing(tmp_path: Path) -> None:
    plain = Fabric(accelerator="cpu", devices=1)
    model, _ = set_up(plain)
    plain.save(tmp_path / "x.ckpt", {"model": model})
    fabric = make()
    model, _ = set_up(fabric)
    fabric.load(tmp_path / "x.ckpt", {"model": model})
    fabric.precision.load_state_dict({})
    assert scale(fabric) == SCALE


# -- two processes -------------------------------------------------------------------------------

SCRIPT = '''
import torch
from torch import nn

from torchweft import Fabric


def work(fabric):
    """An overflow on one rank alone is one on both, and the same step is skipped on both."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    before = model.weight.detach().clone()
    loss = model(torch.ones(1, 3)).sum()
    fabric.backward(loss * (float("inf") if fabric.global_rank == 1 else 1.0))
    optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.zero_grad()
    fabric.backward(model(torch.full((1, 3), fabric.global_rank + 1.0)).sum())
    fabric.clip_gradients(model, optimizer, max_norm=100.0)
    optimizer.step()
    torch.testing.assert_close(model.weight, before - 0.15)
    both = fabric.all_gather(model.weight.detach())
    assert torch.equal(both[0], both[1])
    return fabric.precision.state_dict()["scale"]


if __name__ == "__main__":
    fabric = Fabric(
        accelerator="cpu", strategy="ddp_fork", devices=2, precision="16-mixed:init_scale=1024"
    )
    print(fabric.launch(work))
'''


def test_two_processes_agree_on_a_skipped_step(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # gloo of some versions says something too.
    told = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert told == ["512.0"]
