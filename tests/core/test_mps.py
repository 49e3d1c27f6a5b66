"""Apple's GPU: refused where there is none."""

from __future__ import annotations

import platform
import sys
from typing import Any

import pytest
import torch

from torchweft import Fabric
from torchweft.api import RankInfo
from torchweft.builtin.mps import MPS
from torchweft.builtin.probe import mps
from torchweft.errors import NotAvailable

absent = pytest.mark.skipif(torch.backends.mps.is_available(), reason="this is an Apple computer")


@pytest.mark.parametrize(
    ("system", "machine", "there"),
    [("darwin", "arm64", True), ("darwin", "x86_64", False), ("linux", "arm64", False)],
)
def test_only_apple_silicon_has_it(
    system: str, machine: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    answer = mps()
    assert (answer.ok, answer.count) == (there, 1 if there else None)
    if not there:
        assert answer.reason.endswith("not an Apple computer with Apple silicon")
        assert answer.hint == "use accelerator='cpu'"


@absent
def test_asked_for_elsewhere_it_is_an_error_that_says_why() -> None:
    with pytest.raises(NotAvailable, match="not an Apple computer with Apple silicon"):
        Fabric(accelerator="mps")


@absent
def test_a_torch_that_cannot_use_it_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(NotAvailable, match=r"cannot use it here; .* or use accelerator='cpu'"):
        MPS().bind(RankInfo(), (0,))


def test_it_does_not_survive_a_fork() -> None:
    assert MPS().fork_hazard() == "Metal cannot be used in a forked process"


def test_it_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "state")
    monkeypatch.setattr(torch.mps, "set_rng_state", calls.append)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 12)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("waited"))
    accelerator = MPS()
    assert accelerator.bind(RankInfo(), (0,)) == torch.device("mps")
    accelerator.set_rng_state(accelerator.rng_state())
    accelerator.synchronize()
    assert calls == ["state", "waited"]
    assert accelerator.memory() == {"allocated": 12}
