"""DistributedDataParallel: its options, and training on two real processes."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchweft import Fabric
from torchweft.errors import IncompatiblePlan, InvalidRequest, Misuse, UnknownOption
from torchweft_cuda.ddp import DDPStrategy

OURS = {"process_group_backend", "timeout", "ddp_comm_state", "ddp_comm_hook"}


@pytest.fixture(autouse=True)
def _group_ends() -> Iterator[None]:
    """DDP on one device makes a group of this process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def make(**options: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **{"strategy": "ddp", **options})


# -- options -------------------------------------------------------------------------------------


def test_every_keyword_of_torchs_class_is_accepted_with_its_default() -> None:
    theirs = dict(inspect.signature(DistributedDataParallel).parameters)
    del theirs["module"]
    ours = inspect.signature(DDPStrategy).parameters
    newer = {"bucket_cap_mb_list", "batched_grad_copy", "forward_sync_buffers"} - set(theirs)
    assert set(ours) - OURS - newer == set(theirs)
    differing = {name for name in theirs if ours[name].default != theirs[name].default}
    assert differing == {"gradient_as_bucket_view"}
    documented = inspect.getdoc(DDPStrategy) or ""
    for name in differing | OURS:
        assert f"\n    {name}: " in documented, name
    assert all(p.kind is p.KEYWORD_ONLY for p in ours.values())


def test_what_is_given_reaches_torchs_class() -> None:
    fabric = make(strategy=DDPStrategy(find_unused_parameters=True, bucket_cap_mb=7))
    model = fabric.setup(nn.Linear(2, 2))
    assert type(model.prepared) is DistributedDataParallel
    assert model.prepared.find_unused_parameters
    assert model.prepared.bucket_bytes_cap == 7 * 1024 * 1024
    assert model.prepared.gradient_as_bucket_view
    plain = make(strategy="ddp:gradient_as_bucket_view=false").setup(nn.Linear(2, 2))
    assert not plain.prepared.gradient_as_bucket_view


def test_options_are_the_same_by_string_by_object_and_by_preset() -> None:
    by_string = make(strategy="ddp:find_unused_parameters=true,bucket_cap_mb=50")
    by_object = make(strategy=DDPStrategy(find_unused_parameters=True, bucket_cap_mb=50))
    assert vars(by_string.strategy) == vars(by_object.strategy)
    by_preset = make(strategy="ddp_find_unused_parameters_true:bucket_cap_mb=50")
    assert by_preset.plan.options == by_string.plan.options
    assert vars(by_preset.strategy) == vars(by_object.strategy)
    plans = [fabric.plan.strategy for fabric in (by_string, by_object, by_preset)]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize(
    ("strategy", "launcher"),
    [("ddp_spawn", "spawn"), ("ddp_fork", "fork"), ("ddp_notebook", "fork"), ("ddp", "script")],
)
def test_presets_that_stand_for_a_launcher(strategy: str, launcher: str) -> None:
    plan = Fabric(accelerator="cpu", devices=2, strategy=strategy).plan
    assert (plan.strategy.name, plan.launcher.name) == ("ddp", launcher)


def test_an_unknown_option_is_an_error_with_the_nearest_known_one() -> None:
    with pytest.raises(
        UnknownOption,
        match=r"strategy 'ddp' has no option 'find_unused_parameter'; did you mean "
        r"'find_unused_parameters'\?",
    ):
        make(strategy="ddp:find_unused_parameter=true")
    with pytest.raises(InvalidRequest, match=r"takes static_graph as bool, not 3"):
        make(strategy="ddp:static_graph=3")


def test_a_keyword_that_this_torch_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(DistributedDataParallel):
        def __init__(self, module: Any, gradient_as_bucket_view: bool = False) -> None: ...

    monkeypatch.setattr("torchweft_cuda.ddp.DistributedDataParallel", Older)
    with pytest.raises(
        IncompatiblePlan,
        match=rf"^strategy 'ddp' was given static_graph=, which DistributedDataParallel of torch "
        rf"{torch.__version__.replace('+', '[+]')} does not have; leave it out, or use another "
        r"torch$",
    ):
        DDPStrategy(static_graph=True)
    # What nobody asked for is not missed.
    DDPStrategy(static_graph=False, bucket_cap_mb=None)


@pytest.mark.parametrize("backend", ["gloo", "GLOO", "cpu:gloo", "cpu:gloo,cuda:nccl", None])
def test_backends_that_torch_knows(backend: str | None) -> None:
    DDPStrategy(process_group_backend=backend)


def test_a_backend_that_torch_does_not_know_is_an_error() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^strategy 'ddp' was given process_group_backend='cpu:glo', and torch.distributed "
        r"knows no backend 'glo'; did you mean 'gloo'\? it knows .*nccl",
    ):
        make(strategy=DDPStrategy(process_group_backend="cpu:glo"))


# -- one process ---------------------------------------------------------------------------------


class Net(nn.Module):
    """A model with another way to be called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, data: Any) -> Any:
        return self.linear(data)

    def loss(self, data: Any, *, scale: float = 1.0) -> Any:
        if data.sum() < 0:
            raise KeyError("inside")
        return self(data).sum() * scale


def test_a_module_that_nothing_trains_stays_as_it_is() -> None:
    fabric = make()
    module = nn.Linear(2, 2).requires_grad_(False)
    model = fabric.setup(module)
    assert model.prepared is module
    with fabric.no_backward_sync(model):
        model(torch.ones(1, 2))
    model.mark_forward_method("extra_repr")
    assert "in_features=2" in model.extra_repr()


def test_names_are_those_of_the_original() -> None:
    module = nn.Linear(2, 2)
    model = make().setup(module)
    assert model.module is module
    assert list(model.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]


def test_another_method_goes_through_torchs_class() -> None:
    fabric = make(strategy="ddp_find_unused_parameters_true")
    model = fabric.setup(Net())
    data = torch.ones(1, 2)
    with pytest.raises(Misuse, match=r"Net.loss\(\) runs Net past the strategy"):
        model.loss(data)
    model.mark_forward_method("loss")
    expected = model(data).sum() * 3
    loss = model.loss(data, scale=3.0)
    assert torch.equal(loss, expected)
    fabric.backward(loss)
    assert model.linear.weight.grad is not None
    # Whatever happens inside, forward is itself again.
    with pytest.raises(KeyError, match="inside"):
        model.loss(-data)
    assert "forward" not in vars(model.module)
    assert model(data).shape == (1, 2)
    model.module.forward = lambda given: given  # type: ignore[method-assign]
    assert torch.equal(model.loss(data), data.sum())
    assert torch.equal(model(data), data)


def test_a_compiled_model_is_compiled_around_torchs_class() -> None:
    fabric = make(precision="bf16-mixed")
    module = nn.Linear(2, 2)
    compiled = torch.compile(module, backend="eager")
    model, optimizer = fabric.setup(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1))
    assert type(model.prepared) is DistributedDataParallel
    assert list(model.state_dict()) == ["weight", "bias"]
    before = module.bias.detach().clone()
    for last in (False, True):
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    assert torch.allclose(module.bias, before - 0.2)


def test_gradients_are_clipped_and_accumulated() -> None:
    fabric = make()
    module = nn.Linear(2, 2)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    with fabric.no_backward_sync(model):
        fabric.backward(model(torch.ones(1, 2)).sum())
    fabric.backward(model(torch.ones(1, 2)).sum())
    assert torch.equal(module.bias.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
    assert norm is not None
    assert torch.isclose(norm, torch.tensor(24.0).sqrt())


# -- two processes -------------------------------------------------------------------------------

SCRIPT = '''
import copy
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchweft import Fabric
from torchweft.errors import InvalidRequest, Misuse


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.used = nn.Linear(3, 2)
        self.unused = nn.Linear(3, 2)

    def forward(self, data):
        return self.used(self.norm(data))

    def loss(self, data):
        return self(data).square().mean()


def same_everywhere(fabric, tensor):
    both = fabric.all_gather(tensor.detach())
    return torch.equal(both[0], both[1])


def accumulation(fabric):
    """Two micro-batches on each of two ranks make the gradients of one batch of all four."""
    torch.manual_seed(0)
    plain = nn.Linear(3, 2).double()
    data = torch.randn(4, 5, 3, dtype=torch.float64)
    plain(data.flatten(0, 1)).square().mean().backward()
    original = copy.deepcopy(plain)
    original.zero_grad()
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    model, optimizer = fabric.setup(original, optimizer)
    mine = data[fabric.global_rank * 2 :][:2]
    for index, batch in enumerate(mine):
        with fabric.no_backward_sync(model, enabled=index == 0):
            fabric.backward(model(batch).square().mean() / 2)
        assert same_everywhere(fabric, model.weight.grad) == (index == 1)
    torch.testing.assert_close(model.weight.grad, plain.weight.grad, rtol=0, atol=1e-12)
    norm = fabric.clip_gradients(model, optimizer, max_norm=0.5)
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(model.weight.grad, plain.weight.grad)
    optimizer.step()
    assert same_everywhere(fabric, model.weight)


def buffers(fabric):
    """Parameters and buffers begin as rank 0's, and buffers follow it."""
    torch.manual_seed(fabric.global_rank)
    original = Net()
    original.norm.running_mean.fill_(fabric.global_rank)
    model, optimizer = fabric.setup(original, torch.optim.SGD(original.parameters(), lr=0.1))
    assert type(model.prepared) is DistributedDataParallel
    assert same_everywhere(fabric, model.used.weight)
    assert same_everywhere(fabric, model.norm.running_mean)
    for _ in range(3):
        data = torch.randn(4, 3) + fabric.global_rank
        optimizer.zero_grad()
        fabric.backward(model(data).sum())
        optimizer.step()
    assert model.unused.weight.grad is None
    assert same_everywhere(fabric, model.used.weight)
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 3))


def another_method(fabric):
    original = Net()
    model, optimizer = fabric.setup(original, torch.optim.SGD(original.parameters(), lr=0.1))
    data = torch.randn(4, 3) + fabric.global_rank
    try:
        model.loss(data)
        raise AssertionError("past the strategy")
    except Misuse as error:
        assert "mark_forward_method('loss')" in str(error)
    model.mark_forward_method("loss")
    for _ in range(2):
        fabric.backward(model.loss(data))
        assert same_everywhere(fabric, model.used.weight.grad)
        optimizer.step()
        optimizer.zero_grad()


def strangers(fabric):
    model = nn.Linear(2, 2)
    temperature = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    try:
        fabric.setup(model, optimizer)
        raise AssertionError("foreign parameter")
    except InvalidRequest as error:
        assert str(error) == (
            "SGD holds 1 parameter(s) that belong to no model that was set up, the first of "
            "shape (3,); their gradients would differ between the processes: make them part of "
            "the model, or set up their model before"
        )


def work(fabric):
    accumulation(fabric)
    buffers(fabric)
    another_method(fabric)
    strangers(fabric)
    return fabric.plan.strategy.name


if __name__ == "__main__":
    fabric = Fabric(
        accelerator="cpu",
        strategy="ddp_find_unused_parameters_true",
        devices=2,
        launcher=sys.argv[1],
    )
    print(fabric.launch(work))
'''


@pytest.mark.parametrize("launcher", ["fork", "spawn"])
def test_two_processes(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), launcher],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ddp\n")
    assert "Error" not in done.stderr


# -- a GPU ---------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_one_rank_over_nccl(precision: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(GPU_SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), precision],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("nccl\n")


GPU_SCRIPT = """
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchweft import Fabric

torch.manual_seed(0)
fabric = Fabric(accelerator="cuda", devices=1, strategy="ddp", precision=sys.argv[1])
fabric.launch()
assert fabric.device == torch.device("cuda", 0)
net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.05))
data = torch.randn(64, 4)
loader = DataLoader(TensorDataset(data, data.sum(1, keepdim=True)), 16, pin_memory=True)
loader = fabric.setup_dataloaders(loader)
losses = []
for _ in range(15):
    for input, target in loader:
        assert input.device == fabric.device
        optimizer.zero_grad()
        output = model(input)
        assert output.dtype == torch.float32
        loss = nn.functional.mse_loss(output, target)
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=10.0)
        assert norm.device == fabric.device
        optimizer.step()
    losses.append(fabric.all_reduce(loss.detach()).item())
assert losses[-1] < losses[0] / 2, losses

sent = {"here": torch.ones(2, device=fabric.device), "host": torch.ones(2)}
got = fabric.broadcast(sent)
assert got["here"].device == fabric.device and got["host"].device.type == "cpu"
assert fabric.broadcast(torch.ones(3)).tolist() == [1, 1, 1]
assert fabric.all_gather(torch.tensor(2.5, device=fabric.device)).item() == 2.5
assert fabric.all_gather(3).item() == 3
fabric.barrier()
print(dist.get_backend())
"""
