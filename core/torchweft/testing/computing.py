"""What ranks do with a device, and what they found."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchweft.api import RankInfo
from torchweft.fabric import Fabric
from torchweft.specs import load_target
from torchweft.testing.models import Samples, build

__all__ = [
    "allocate",
    "bind",
    "compute",
    "construct",
    "count",
    "draw",
    "fork_after_use",
    "initialise",
    "load",
    "move",
    "save",
    "talk",
]

#: Device files that say nothing of a device.
_HARMLESS = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/pts/", "/dev/tty", "/dev/shm/")

#: Bytes that show in any count of memory.
ENOUGH = 32 << 20


# -- before a device is bound: in ranks that compute on the processor ------------------------------


def construct(
    fabric: Fabric, target: str, options: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """Import and construct an accelerator, and look what was touched by it."""
    opened, initialised = _opened(), _initialised(device)
    accelerator = load_target(target, "the conformance kit")(**options)
    hazard = accelerator.fork_hazard()
    # Asked for its hazard it may look, and has to leave no trace of that either.
    accelerator.fork_hazard()
    return {
        "opened": sorted(_opened() - opened),
        "initialised": _initialised(device) and not initialised,
        "hazard": hazard,
    }


def _opened() -> set[str]:
    """The device files that this process holds open."""
    folder = Path("/proc/self/fd")
    found = set()
    for entry in folder.iterdir() if folder.is_dir() else ():
        try:
            path = os.readlink(entry)
        except OSError:  # it was that of the folder itself
            continue
        if path.startswith("/dev/") and not path.startswith(_HARMLESS):
            found.add(path)
    return found


def _initialised(device: str) -> bool:
    """Whether torch holds the kind of device for initialised, where it says."""
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        return False
    answer = getattr(module, "is_initialized", None)
    return answer is not None and bool(answer())


def bind(
    fabric: Fabric, target: str, options: Mapping[str, Any], devices: Sequence[int]
) -> dict[str, Any]:
    """Have the accelerator bind the device of this rank."""
    rank = RankInfo(
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        local_rank=fabric.global_rank,
        local_world_size=fabric.world_size,
        run_id="conformance",
    )
    bound: Any = load_target(target, "the conformance kit")(**options).bind(rank, devices)
    if not isinstance(bound, torch.device):
        return {"returned": repr(bound)}
    made = torch.ones(2, device=bound.type).device
    return {"type": bound.type, "index": bound.index, "current": made.index}


# -- on the device ---------------------------------------------------------------------------------


def move(fabric: Fabric) -> dict[str, Any]:
    """Bring nested batches and those of a loader to the device."""
    host = torch.arange(6.0).reshape(2, 3)
    given = {"list": [host, (host.long(), 3)], "text": "kept", "nothing": None, "flag": host > 2}
    moved = fabric.to_device(given)
    tensors = [moved["list"][0], moved["list"][1][0], moved["flag"]]
    data: Any = torch.arange(8.0)
    batches = list(fabric.setup_dataloaders(DataLoader(data, batch_size=4)))
    return {
        "devices": [_found(fabric, tensor) for tensor in tensors],
        "values": {**moved, "list": moved["list"]},
        "given": given,
        "batches": torch.cat([batch.cpu() for batch in batches]),
        "of batches": [_found(fabric, batch) for batch in batches],
        "model": [_found(fabric, p) for p in fabric.to_device(nn.Linear(2, 2)).parameters()],
        "mixed": _mixes(host, fabric.device),
        "on host": fabric.accelerator.host_memory,
    }


def _found(fabric: Fabric, tensor: Tensor) -> str:
    """Empty where a tensor is on the bound device; otherwise where it is."""
    wanted, found = fabric.device, tensor.device
    # Some kinds of device have one alone, which needs no number.
    same = found.type == wanted.type and (
        wanted.index is None or found.index is None or wanted.index == found.index
    )
    return "" if same else f"{found} instead of {wanted}"


def _mixes(host: Tensor, device: torch.device) -> bool:
    """Whether the device computes with what is in the host's memory."""
    try:
        return torch.equal((host + torch.ones(2, 3, device=device)).cpu(), host + 1)
    except RuntimeError:
        return False


def compute(fabric: Fabric) -> dict[str, Any]:
    """Results of the device, and those of the processor on the same numbers."""
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(16, 24, generator=generator)
    other = torch.randn(24, 8, generator=generator)
    told: dict[str, Any] = {}
    for name, function in _COMPUTED.items():
        here = [tensor.to(fabric.device) for tensor in (one, other)]
        result = function(*here)
        fabric.accelerator.synchronize()
        told[name] = (_found(fabric, result), result.cpu(), function(one, other))
    made = torch.arange(5, device=fabric.device)
    told["made there"] = (_found(fabric, made), made.cpu(), torch.arange(5))
    return told


_COMPUTED: Mapping[str, Any] = {
    "a product of matrices": lambda one, other: one @ other,
    "a softmax": lambda one, other: one.softmax(-1),
    "a sum": lambda one, other: one.sum(0),
    "a comparison": lambda one, other: one > 0,
    "a sort": lambda one, other: one.sort(-1).values,
    "whole numbers": lambda one, other: (one * 10).long() % 7,
}


def draw(fabric: Fabric) -> dict[str, Any]:
    """Random numbers of the device, again after its generator's state was restored."""
    accelerator, device = fabric.accelerator, fabric.device

    def draws() -> Tensor:
        return torch.cat([torch.rand(4, device=device), torch.randn(4, device=device)]).cpu()

    draws()
    state = accelerator.rng_state()
    host = torch.get_rng_state()
    told: dict[str, Any] = {"own": state is not None, "first": draws(), "further": draws()}
    for name in ("again", "and again"):
        if state is None:
            torch.set_rng_state(host)
        else:
            accelerator.set_rng_state(state)
        told[name] = draws()
    for name, seed in (("seeded", 7), ("seeded again", 7), ("otherwise", 8)):
        fabric.seed_everything(seed)
        told[name] = draws()
    return told


def allocate(fabric: Fabric) -> dict[str, Any]:
    """What ``memory()`` counts before and after a large tensor was made, and its bytes."""
    torch.ones(1, device=fabric.device)
    before = fabric.accelerator.memory()
    kept = torch.ones(ENOUGH // 4, device=fabric.device)
    fabric.accelerator.synchronize()
    return {"before": before, "after": fabric.accelerator.memory(), "bytes": kept.nbytes}


def count(fabric: Fabric) -> int | None:
    """How many devices torch sees from this process, where it counts them."""
    try:
        module = torch.get_device_module(fabric.device)
    except RuntimeError:  # torch has no module of that name
        return None
    counted = getattr(module, "device_count", None)
    return None if counted is None else int(counted())


def fork_after_use(fabric: Fabric) -> dict[str, Any]:
    """What ``fork_hazard`` says once the device computed, and how a fork then fares."""
    torch.set_num_threads(1)
    (torch.ones(4, 4, device=fabric.device) @ torch.ones(4, 4, device=fabric.device)).cpu()
    hazard = fabric.accelerator.fork_hazard()
    if hazard is not None:
        return {"hazard": hazard, "status": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(20)  # a broken device may hang
            right = (torch.ones(2, device=fabric.device) + 1).cpu().tolist() == [2.0, 2.0]
            status = 0 if right else 1
        finally:
            os._exit(status)
    return {"hazard": None, "status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


def initialise(fabric: Fabric) -> list[str]:
    """Where parameters and buffers are that were made under ``init_module()``."""
    with fabric.init_module():
        module = nn.BatchNorm1d(3)
    return [_found(fabric, tensor) for tensor in (*module.parameters(), *module.buffers())]


def talk(fabric: Fabric) -> dict[str, Any]:
    """What a rank hears from the others over the accelerator's backend."""
    name = fabric.accelerator.backend
    # "cpu:gloo,cuda:nccl" names one for each kind of device.
    parts = [part.rpartition(":")[2] for part in name.split(",")]
    known = list(dist.Backend.backend_list)
    told: dict[str, Any] = {
        "backend": name,
        "known": known,
        "unknown": [part for part in parts if part not in known],
    }
    if fabric.world_size > 1:
        mine = torch.full((3,), fabric.global_rank + 1.0, device=fabric.device)
        summed = fabric.all_reduce(mine.clone(), reduce_op="sum")
        told["summed"], told["where"] = summed, _found(fabric, summed)
        told["gathered"] = fabric.all_gather(mine)
        told["broadcast"] = fabric.broadcast(mine)
        fabric.barrier()
    return told


# -- checkpoints -----------------------------------------------------------------------------------


def save(fabric: Fabric, path: Path, seed: int) -> dict[str, Tensor]:
    """Train a step, so that the optimizer has a state too, and write a checkpoint."""
    model, optimizer = _set_up(fabric, seed)
    data = Samples(8)
    x, y = fabric.to_device((data.x, data.y))
    fabric.backward((model(x) - y).square().mean())
    optimizer.step()
    fabric.save(path, {"model": model, "optimizer": optimizer})
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def load(fabric: Fabric, path: Path, seed: int) -> dict[str, Any]:
    """Read a checkpoint that may be another device's."""
    model, optimizer = _set_up(fabric, seed)
    fabric.load(path, {"model": model, "optimizer": optimizer})
    values = model.state_dict()
    states = [v for state in optimizer.state.values() for v in state.values()]
    # Adam's counts of steps stay with the processor.
    moments = [value for value in states if isinstance(value, Tensor) and value.dim()]
    return {
        "values": {name: value.detach().cpu() for name, value in values.items()},
        "where": [_found(fabric, tensor) for tensor in (*values.values(), *moments)],
        "moments": len(moments),
    }


def _set_up(fabric: Fabric, seed: int) -> tuple[Any, Any]:
    plain = build("plain", seed)
    ready: tuple[Any, Any] = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=0.01))
    return ready
