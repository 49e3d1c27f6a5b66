"""Accelerators, precisions and launchers with one mistake each, and a plugin that declares them.

The tests install this module as a stranger's would be, since scripts have to find it too.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from torchweft.api import Autocast, Precision, map_leaves
from torchweft.builtin.cpu import CPU
from torchweft.builtin.launchers.function import Fork
from torchweft.builtin.precisions import Full
from torchweft.errors import RankFailed
from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec, Availability, LauncherSpec, PrecisionSpec
from torchweft_cuda.half_mixed import HalfMixed

# -- accelerators ----------------------------------------------------------------------------------


class Indexed(CPU):
    """No mistake: a processor whose devices have numbers."""

    def bind(self, rank, devices):
        return torch.device("cpu", devices[rank.local_rank])


class OffByOne(CPU):
    def bind(self, rank, devices):
        return torch.device("cpu", devices[(rank.local_rank + 1) % len(devices)])


class AnotherType(CPU):
    def bind(self, rank, devices):
        return torch.device("meta")


class ReturnsItsName(CPU):
    def bind(self, rank, devices):
        return "cpu"


class ForgetsRandomNumbers(CPU):
    def rng_state(self):
        return torch.get_rng_state()

    def set_rng_state(self, state):
        pass


class TalksToNobody(CPU):
    backend = "gluu"


class TouchesEarly(CPU):
    def __init__(self):
        self.file = open("/dev/zero")  # noqa: SIM115


class CountsNothing(CPU):
    def memory(self):
        return {"allocated": 5}


class HidesItsHazard(CPU):
    """A fork of a process that uses it comes to an end, and it says nothing of that."""

    def bind(self, rank, devices):
        os.register_at_fork(after_in_child=lambda: os._exit(1))
        return super().bind(rank, devices)


# -- precisions ------------------------------------------------------------------------------------


class ClipsScaled(HalfMixed):
    def unscale(self, optimizer):
        pass


class NeverUnscales(HalfMixed):
    def unscale(self, optimizer):
        pass

    def step(self, optimizer, closure):
        return optimizer.step()


class StepsInSpite(HalfMixed):
    """True gradients, and a step with them even where they overflowed."""

    def step(self, optimizer, closure):
        self.unscale(optimizer)
        result = optimizer.step()
        self._true.pop(optimizer, None)
        self._stepped = True
        return result


class ForgetsItsScale(HalfMixed):
    def state_dict(self):
        return {}


class ScalesInSecret(Full):
    def scale(self, loss):
        return loss * 8

    def unscale(self, optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= 8

    def step(self, optimizer, closure):
        self.unscale(optimizer)
        return super().step(optimizer, None)


class ConvertsEverything(Precision):
    def convert_input(self, data):
        return map_leaves(data, lambda leaf: leaf.float() if torch.is_tensor(leaf) else leaf)


class LeavesADefault(Precision):
    def start(self, device):
        super().start(device)
        torch.set_default_dtype(torch.float64)


class OneContext(Autocast):
    """One context for all, which mixes up what it restores."""

    dtype = torch.bfloat16

    def start(self, device):
        super().start(device)
        self._context = torch.autocast(device.type, dtype=self.dtype)

    def forward_context(self):
        return self._context


class MakesAnother(Precision):
    """Converts models, and makes those of init_module() as they were."""

    def convert_module(self, module):
        return module.to(torch.bfloat16)

    def convert_input(self, data):
        return map_leaves(
            data,
            lambda leaf: (
                leaf.bfloat16() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf
            ),
        )


class KeepsTheResult(Precision):
    def step(self, optimizer, closure):
        super().step(optimizer, closure)


class KeepsGradients(Precision):
    def zero_grad(self, optimizer, set_to_none=True):
        pass


# -- launchers -------------------------------------------------------------------------------------


class Lonely(Fork):
    """Every rank takes itself for the only one."""

    name = "lonely"

    def rank(self, environ):
        alone = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1}
        return dataclasses.replace(super().rank(environ), **alone)


class LeavesAProcess(Fork):
    name = "leaves-a-process"

    def launch(self, plan, function, arguments, **more):
        if not self.is_rank(os.environ, self.name):
            subprocess.Popen(["sleep", "600"])
        return super().launch(plan, function, arguments, **more)


class OfTheLastRank(Fork):
    """Returns what the last rank returned."""

    name = "of-the-last-rank"

    def launch(self, plan, function, arguments, **more):
        if self.is_rank(os.environ, self.name) or function is None:
            return super().launch(plan, function, arguments, **more)
        path = Path(tempfile.mkdtemp()) / "result"
        return super().launch(plan, _swapped, (function, arguments, path), **more)


def _swapped(function, arguments, path):
    result = function(*arguments)
    if os.environ["RANK"] != "0":
        path.with_suffix(".part").write_bytes(pickle.dumps(result))
        path.with_suffix(".part").rename(path)
        return None
    while not path.exists():
        time.sleep(0.01)
    return pickle.loads(path.read_bytes())


class Deaf(Fork):
    """A rank that fails goes unnoticed."""

    name = "deaf"

    def launch(self, plan, function, arguments, **more):
        try:
            return super().launch(plan, function, arguments, **more)
        except RankFailed:
            return None


# -- the plugin ------------------------------------------------------------------------------------

ACCELERATORS = (
    Indexed,
    OffByOne,
    AnotherType,
    ReturnsItsName,
    ForgetsRandomNumbers,
    TalksToNobody,
    TouchesEarly,
    CountsNothing,
    HidesItsHazard,
)
PRECISIONS = (
    ClipsScaled,
    NeverUnscales,
    StepsInSpite,
    ForgetsItsScale,
    ScalesInSecret,
    ConvertsEverything,
    LeavesADefault,
    OneContext,
    MakesAnother,
    KeepsTheResult,
    KeepsGradients,
)
LAUNCHERS = (Lonely, LeavesAProcess, OfTheLastRank, Deaf)


def nowhere():
    return Availability(ok=False, reason="there is none", hint="buy one")


def _named(cls):
    """``"OffByOne"`` is asked for as ``"off-by-one"``."""
    words = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in cls.__name__)
    return {"name": words.removeprefix("-"), "target": f"{__name__}:{cls.__name__}", "summary": "-"}


@hookimpl
def torchweft_accelerators():
    nowhere = AcceleratorSpec(
        name="nowhere", target=f"{__name__}:Indexed", device="cpu", probe=f"{__name__}:nowhere"
    )
    return [*(AcceleratorSpec(**_named(cls), device="cpu") for cls in ACCELERATORS), nowhere]


@hookimpl
def torchweft_precisions():
    return [PrecisionSpec(**_named(cls)) for cls in PRECISIONS]


@hookimpl
def torchweft_launchers():
    return [LauncherSpec(**_named(cls), function="required") for cls in LAUNCHERS]
