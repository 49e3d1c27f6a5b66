"""The surface of a Fabric on XLA devices, beside plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.xla.scripts import script, told
from torchweft import Fabric
from torchweft.errors import InvalidRequest
from torchweft.testing import run_ranks

BOTH = pytest.mark.parametrize("strategy", ["xla", "xla_fsdp"])


def on(devices: int, function: Any, *arguments: Any, strategy: str = "xla", **asked: Any) -> Any:
    """What the one process answers."""
    environ = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}
    (answer,) = run_ranks(
        devices,
        function,
        *arguments,
        accelerator="xla",
        strategy=strategy,
        environ=environ,
        timeout=100,
        **asked,
    )
    return answer


def sharding(tensor: torch.Tensor) -> str:
    import torch_xla

    return str(torch_xla._XLAC._get_xla_sharding_spec(tensor))


# -- numbers and batches -----------------------------------------------------------------------


def numbers(fabric: Fabric) -> dict[str, Any]:
    data = TensorDataset(torch.arange(22.0).reshape(22, 1), torch.arange(22))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2))
    batches = [(x, y) for x, y in loader]
    return {
        "counts": (fabric.world_size, fabric.global_rank, fabric.num_replicas, len(loader)),
        "shapes": [tuple(x.shape) for x, _ in batches],
        "shardings": [sharding(x) for x, _ in batches],
        "samples": torch.cat([y for _, y in batches]).tolist(),
        "gathered": fabric.all_gather(batches[0][1]),
        "reduced": fabric.all_reduce(batches[0][0].mean()).item(),
        "batch size": loader.batch_size,
    }


def test_a_batch_size_is_per_device_and_processes_are_counted_as_such() -> None:
    found = on(4, numbers)
    assert found["counts"] == (1, 0, 4, 3)
    assert found["batch size"] == 2
    assert found["shapes"] == [(8, 1), (8, 1), (8, 1)]
    assert found["shardings"] == ["{devices=[4,1]0,1,2,3}"] * 3
    # Each device has what a process of ddp would have; the sampler fills up as it does there.
    assert found["samples"][:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert sorted(found["samples"]) == sorted([0, 1, *range(22)])
    # Between processes, of which there is one.
    assert found["gathered"].shape == (8,)
    assert found["reduced"] == 3.5


def uneven(fabric: Fabric, strategy: str) -> tuple[float, list[Any], str]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x = torch.randn(7, 3)
    sent = fabric.to_device(x)
    loss = model(sent).square().mean()
    fabric.backward(loss)
    optimizer.step()
    return loss.item(), [p.detach().cpu() for p in net.parameters()], sharding(sent)


@BOTH
def test_a_batch_that_does_not_divide_is_exact(strategy: str) -> None:
    loss, parameters, how = on(4, uneven, strategy, strategy=strategy)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    right = net(torch.randn(7, 3)).square().mean()
    right.backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert loss == pytest.approx(right.item(), rel=1e-6)
    for mine, plain in zip(parameters, net.parameters(), strict=True):
        torch.testing.assert_close(mine, plain.detach(), rtol=1e-5, atol=1e-6)
    assert "devices" not in how


def dropped(fabric: Fabric) -> tuple[torch.Tensor, torch.Tensor]:
    fabric.seed_everything(5)
    ones = fabric.to_device(torch.ones(4, 64))
    first = nn.functional.dropout(ones, 0.5).cpu()
    fabric.seed_everything(5)
    return first, nn.functional.dropout(ones, 0.5).cpu()


def test_each_device_drops_other_values_and_a_seed_brings_them_again() -> None:
    first, again = on(4, dropped)
    rows = {tuple(row.tolist()) for row in first}
    assert len(rows) == 4
    assert 0.2 < (first == 0).float().mean() < 0.8
    assert torch.equal(first, again)


def state_of_generator(fabric: Fabric) -> tuple[Any, Any]:
    before = fabric.accelerator.rng_state()
    one = torch.rand(3, device=fabric.device).cpu()
    fabric.accelerator.set_rng_state(before)
    return one, torch.rand(3, device=fabric.device).cpu()


def test_the_state_of_the_generator() -> None:
    one, again = on(2, state_of_generator)
    assert torch.equal(one, again)


def test_a_seed_that_was_set_before_launch_counts(tmp_path: Path) -> None:
    text = """
Fabric.seed_everything(int(sys.argv[1]))
fabric = Fabric(accelerator="xla")
fabric.launch()
tell(drawn=torch.rand(4, device=fabric.device).tolist())
"""
    drawn = [
        told(script(text.replace("sys.argv[1]", seed), tmp_path))["drawn"]
        for seed in ("3", "3", "4")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


# -- models ------------------------------------------------------------------------------------


def memory_of_parts(fabric: Fabric) -> dict[str, Any]:
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters()))
    fabric.backward(model(fabric.to_device(torch.randn(8, 16))).sum())
    grads = {name: p.grad for name, p in net.named_parameters()}
    optimizer.step()
    fabric.accelerator.synchronize()
    told: dict[str, Any] = {}
    for name, p in net.named_parameters():
        state = optimizer.optimizer.state[p]
        tensors = [p, grads[name], state["exp_avg"], state["exp_avg_sq"]]
        told[name] = [sharding(tensor) for tensor in tensors]
    return told


def test_fsdp_divides_parameters_gradients_and_state() -> None:
    """Along the longest dimension that divides evenly; what has none is on each device."""
    rows, columns = "{devices=[4,1]0,1,2,3}", "{devices=[1,4]0,1,2,3}"
    found = on(4, memory_of_parts, strategy="xla_fsdp")
    assert found == {
        "0.weight": [rows] * 4,
        "0.bias": ["{devices=[4]0,1,2,3}"] * 4,
        "2.weight": [columns] * 4,
        "2.bias": ["{replicated}"] * 4,
    }
    found = on(4, memory_of_parts, strategy="xla_fsdp:min_size=100")
    assert found["0.weight"] == [rows] * 4
    assert found["0.bias"] == ["{replicated}"] * 4


def identity(fabric: Fabric) -> tuple[bool, bool, str]:
    net = nn.Linear(4, 4)
    tied = nn.ModuleList([net, nn.Linear(4, 4)])
    tied[1].weight = net.weight
    held = net.weight
    fabric.setup(tied, torch.optim.SGD(tied.parameters(), lr=0.1))
    return net.weight is held, tied[1].weight is held, held.device.type


def test_parameters_stay_the_same_objects() -> None:
    assert on(2, identity) == (True, True, "xla")


MADE_THERE = """
import resource

import torch_xla.debug.metrics as metrics

fabric = Fabric(accelerator="xla", strategy="xla_fsdp")
fabric.launch()
torch.ones(1, device=fabric.device).cpu()


def held():
    rows = open("/proc/self/status").read().splitlines()
    return {r.split(":")[0]: int(r.split()[1]) for r in rows if r.startswith("Vm")}


before = metrics.metric_data("OutboundData")
with fabric.init_module():
    net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
sent = metrics.metric_data("OutboundData")
sent = (sent[1] if sent else 0) - (before[1] if before else 0)
tell(device=net[0].weight.device.type, sent=sent)
model = fabric.setup(net)
tell(std=net[0].weight.std().item(), whole=4 * 4 * 1024 * 1025)
"""


def test_init_module_makes_parameters_on_the_devices(tmp_path: Path) -> None:
    """Nothing of them is made on the host and sent."""
    found = told(script(MADE_THERE, tmp_path, devices=4))
    assert found["device"] == "xla"
    assert found["sent"] < 1024 < found["whole"]
    # Uniform between -1/32 and 1/32.
    assert found["std"] == pytest.approx(1 / 32 / 3**0.5, rel=0.01)


# -- precisions --------------------------------------------------------------------------------


def trains_in(fabric: Fabric) -> tuple[list[float], str, str]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    seen = []
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(str(output.dtype)))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x = torch.randn(32, 8)
    losses = []
    for _ in range(30):
        batch = fabric.to_device(x)
        loss = nn.functional.mse_loss(model(batch), batch.sum(1, keepdim=True))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist(), seen[0], str(net[0].weight.dtype)


@pytest.mark.parametrize(
    ("precision", "computed", "held"),
    [
        ("32-true", "torch.float32", "torch.float32"),
        ("bf16-mixed", "torch.bfloat16", "torch.float32"),
        ("bf16-true", "torch.bfloat16", "torch.bfloat16"),
        ("16-true", "torch.float16", "torch.float16"),
    ],
)
@BOTH
def test_a_precision(precision: str, computed: str, held: str, strategy: str) -> None:
    losses, found, kept = on(2, trains_in, precision=precision, strategy=strategy)
    assert (found, kept) == (computed, held)
    assert losses[-1] < losses[0] / 4


# -- checkpoints -------------------------------------------------------------------------------


def goes_on(fabric: Fabric, load: str, save: str, steps: int) -> list[float]:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.05))
    if load:
        fabric.load(load, {"model": model, "optimizer": optimizer})
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
    share = x.chunk(fabric.world_size)[fabric.global_rank]
    losses = []
    for _ in range(steps):
        batch = fabric.to_device(share)
        loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach().cpu()).item())
    if save:
        fabric.save(save, {"model": model, "optimizer": optimizer})
    return losses


@BOTH
@pytest.mark.parametrize("name", ["state.ckpt", "state"])
def test_a_checkpoint_of_ddp_goes_on_here_and_back(
    strategy: str, name: str, tmp_path: Path
) -> None:
    plain = on_processors(goes_on, "", "", 9)
    first, second = str(tmp_path / f"one-{name}"), str(tmp_path / f"two-{name}")
    losses = on_processors(goes_on, "", first, 3)
    losses += on(4, goes_on, first, second, 3, strategy=strategy)
    losses += on_processors(goes_on, second, "", 3)
    assert losses == pytest.approx(plain, rel=1e-4)


def on_processors(function: Any, *arguments: Any) -> Any:
    return run_ranks(2, function, *arguments, accelerator="cpu", strategy="ddp")[0]


# -- loops without a loader, and several hosts -------------------------------------------------


def test_a_loop_without_a_loader_has_a_graph_a_step(tmp_path: Path) -> None:
    text = """
import torch_xla.debug.metrics as metrics
fabric = Fabric(accelerator="xla", strategy="xla")
fabric.launch()
net = nn.Linear(4, 4)
model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters()))
for _ in range(20):
    fabric.backward(model(fabric.to_device(torch.randn(4, 4))).sum())
    optimizer.step()
    optimizer.zero_grad()
tell(steps=metrics.counter_value("MarkStep"), compiled=metrics.counter_value("UncachedCompile"))
"""
    found = told(script(text, tmp_path, devices=2))
    assert found["steps"] == 20
    assert found["compiled"] <= 3


def test_hosts_that_xla_does_not_know_of(tmp_path: Path) -> None:
    """XLA's client for the processor is alone on its host: as on a TPU VM that is no pod."""
    text = 'Fabric(accelerator="xla", strategy="xla", num_nodes=2).launch()'
    environ = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "two",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    done = script(text, tmp_path, devices=2, **environ)
    assert done.returncode != 0
    assert (
        "Misuse: strategy 'xla' runs on 2 hosts, and XLA knows of 1: start the script once on "
        "every host of one TPU slice"
    ) in done.stderr


def test_torchweft_run_makes_one_process_for_all_devices(tmp_path: Path) -> None:
    text = """
fabric = Fabric()
fabric.launch()
tell(plan=fabric.plan.summary(), counts=[fabric.world_size, fabric.num_replicas])
"""
    flags = ["--devices", "4", "--accelerator", "xla", "--strategy", "xla_fsdp"]
    found = told(script(text, tmp_path, "-m", "torchweft", "run", *flags, devices=4))
    assert found["plan"].startswith("xla_fsdp on 4 x xla, 32-true, launched by torchrun")
    assert found["counts"] == [1, 4]


def test_on_several_hosts_a_batch_has_to_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one host here: what the strategy knows of the others is made up."""
    from torchweft_xla.strategy import XLAStrategy

    class Two:
        hosts, local = 2, 4

        def send(self, tensor: torch.Tensor, dim: int | None) -> tuple[Any, int | None]:
            return tensor.shape, dim

    strategy = XLAStrategy()
    monkeypatch.setattr(strategy, "_spread", Two())
    assert strategy.move(torch.ones(8, 3)) == ((8, 3), 0)
    with pytest.raises(InvalidRequest) as caught:
        strategy.move([torch.ones(6, 3)])
    assert str(caught.value) == (
        "strategy 'xla' on 2 hosts was given a batch with a tensor of shape (6, 3), whose first "
        "dimension cannot be divided between the 4 devices of a host; write drop_last=True in the "
        "DataLoader, or have its collate_fn fill the last batch up"
    )
