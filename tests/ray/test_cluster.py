"""Where a cluster is reached, and where none is."""

from __future__ import annotations

import os
import socket

import pytest

from torchweft import Fabric
from torchweft.errors import InvalidRequest, NotAvailable
from torchweft_ray.cluster import connected


def closed() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def launch(launcher: str = "ray") -> str:
    with pytest.raises(NotAvailable) as caught:
        Fabric(accelerator="cpu", devices=2, launcher=launcher).launch(lambda fabric: None)
    return str(caught.value)


WAY_OUT = (
    "; start one with 'ray start --head', set RAY_ADDRESS to HOST:PORT of one that runs, or let "
    "launcher='ray:address=local' start one on this computer for this run"
)


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    address = closed()
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert launch() == (
        f"launcher 'ray' reaches no Ray cluster (RAY_ADDRESS says '{address}', and nobody answers "
        f"there: [Errno 111] Connection refused){WAY_OUT}"
    )


def test_an_option_says_more_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed())
    words = launch("ray:address=nowhere.invalid:6379")
    assert "(launcher='ray:address=…' says 'nowhere.invalid:6379', and nobody answers" in words
    assert words.endswith(WAY_OUT)


def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    assert "(RAY_ADDRESS says 'nonsense': Invalid address format" in launch()


def test_rays_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    fabric = Fabric(accelerator="cpu", devices=2, launcher="ray")
    with pytest.raises(InvalidRequest, match="for Ray's client; launcher 'ray' runs on a node of"):
        fabric.launch(lambda fabric: None)


@pytest.mark.parametrize("option", ["cpus_per_rank=0", "timeout=-1"])
def test_numbers_that_mean_nothing(option: str) -> None:
    with pytest.raises(InvalidRequest, match=r"launcher 'ray' was given \w+=.* above 0"):
        Fabric(accelerator="cpu", devices=2, launcher=f"ray:{option}")


@pytest.mark.parametrize("debugger", [None, "mine.set_trace"])
def test_breakpoint_stays_the_user_s(
    debugger: str | None, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would have what this process starts call a debugger of its own."""
    monkeypatch.setenv("PYTHONBREAKPOINT", debugger or "")
    if debugger is None:
        monkeypatch.delenv("PYTHONBREAKPOINT")
    with connected(cluster):
        assert os.environ.get("PYTHONBREAKPOINT") == debugger
    assert os.environ.get("PYTHONBREAKPOINT") == debugger
