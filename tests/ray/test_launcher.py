"""Runs on a cluster of two nodes; what every launcher promises is in ``test_conformance``."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest
import torch
from torch import nn

import ray
from torchweft import Fabric
from torchweft.errors import Misuse, NotAvailable, RankFailed
from torchweft.launching import ERROR_FILE
from torchweft.testing.commands import Command, clean_environment

STEPS, BATCH = 3, 8

#: Beside ``train.py``: what it imports, and what it reads.
MODEL = """
import torch
from torch import nn


def model_and_data():
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, torch.randn(24, 3), torch.randn(24, 1)
"""

SCRIPT = f"""
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from model import model_and_data
from torch import nn

from torchweft import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2, num_nodes=2)
fabric.launch()
model, inputs, targets = model_and_data()
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
share = {BATCH} // fabric.world_size
for step in range({STEPS}):
    first = {BATCH} * step + share * fabric.global_rank
    rows = slice(first, first + share)
    optimizer.zero_grad()
    fabric.backward(nn.functional.mse_loss(model(inputs[rows]), targets[rows]))
    optimizer.step()
here = {{
    "at": [fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size],
    "argv": sys.argv,
    "folder": os.getcwd(),
    "there": sorted(path.name for path in Path().iterdir() if path.name != "__pycache__"),
    "exported": os.environ.get("EXPORTED"),
    "parameters": [p.flatten().tolist() for p in model.parameters()],
}}
print(json.dumps(here))
"""


def one_process() -> list[Any]:
    """Parameters after the same steps, written by hand."""
    names: dict[str, Any] = {}
    exec(MODEL, names)
    model, inputs, targets = names["model_and_data"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        rows = slice(BATCH * step, BATCH * (step + 1))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    return [p.flatten().tolist() for p in model.parameters()]


def test_a_script_on_two_nodes_in_copies_of_its_folder(cluster: str, tmp_path: Path) -> None:
    for name, text in (("train.py", SCRIPT), ("model.py", MODEL), ("large.bin", "not needed")):
        (tmp_path / name).write_text(text)
    environ = {
        "RAY_ADDRESS": cluster,
        "TORCHWEFT_LAUNCHER": "ray:copy_folder=true,exclude='large.* *.tmp'",
        "EXPORTED": "yes",
        "PYTHONWARNINGS": "error",
    }
    words = [sys.executable, str(tmp_path / "train.py"), "--lr", "two words"]
    command = Command(words, clean_environment(environ), DEVNULL, tmp_path)
    done = command.finish()
    assert done.status == 0, done.err
    told: dict[int, Any] = {}
    for line in done.lines:
        mark, _, rest = line.partition("] ")
        told[int(mark.removeprefix("[rank "))] = json.loads(rest)
    assert [told[rank]["at"] for rank in range(4)] == [
        [0, 0, 0, 4],
        [1, 1, 0, 4],
        [2, 0, 1, 4],
        [3, 1, 1, 4],
    ]
    folders = [told[rank]["folder"] for rank in range(4)]
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert not any(Path(folder).exists() for folder in folders)
    for rank in range(4):
        assert told[rank]["argv"] == [f"{folders[rank]}/train.py", "--lr", "two words"]
        assert told[rank]["there"] == ["model.py", "train.py"]
        assert told[rank]["exported"] == "yes"
        for found, right in zip(told[rank]["parameters"], one_process(), strict=True):
            assert found == pytest.approx(right, abs=1e-6)
    assert f"work in a copy of {tmp_path}, and what they write there is gone with it" in done.err
    assert command.left() == []


@pytest.fixture(scope="module")
def connection(cluster: str) -> Iterator[str]:
    """A script's own connection, which launches leave as it is."""
    ray.init(address=cluster, log_to_driver=False, logging_level="WARNING")
    yield cluster
    assert ray.is_initialized()
    ray.shutdown()
    os.environ.pop("PYTHONBREAKPOINT", None)  # Ray has set it


def work(fabric: Fabric) -> None:
    fabric.barrier()


def test_a_closure_on_two_nodes(connection: str, capfd: pytest.CaptureFixture[str]) -> None:
    factor = 3.0

    def work(fabric: Fabric, tensor: torch.Tensor) -> Any:
        print("out of", fabric.global_rank)
        sys.stderr.write(f"err of {fabric.global_rank}, and no end")
        total = fabric.all_reduce(tensor * factor + fabric.global_rank, reduce_op="sum")
        where = (os.getcwd(), os.environ["RAY_ADDRESS"], torch.get_num_threads())
        return total, fabric.node_rank, where

    fabric = Fabric(accelerator="cpu", devices=1, num_nodes=2, strategy="ddp", launcher="ray")
    total, node, where = fabric.launch(work, torch.ones(2))
    assert (total.tolist(), node) == ([7.0, 7.0], 0)
    assert where == (os.getcwd(), connection, 1)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[rank 0] out of 0", "[rank 1] out of 1"]
    said = [line for line in err.splitlines() if line.startswith("[rank")]
    assert sorted(said) == [f"[rank {rank}] err of {rank}, and no end" for rank in (0, 1)]


def test_an_actor_that_is_killed(connection: str, tmp_path: Path) -> None:
    """As Ray does where a node runs out of memory."""

    def work(fabric: Fabric) -> None:
        (tmp_path / str(fabric.global_rank)).write_text(os.environ[ERROR_FILE])
        fabric.barrier()
        if fabric.global_rank == 1:
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    room = ray.cluster_resources()["CPU"]
    fabric = Fabric(accelerator="cpu", devices=1, num_nodes=2, launcher="ray")
    with pytest.raises(RankFailed) as caught:
        fabric.launch(work)
    words = str(caught.value)
    assert re.match(r"rank 1 of 2 failed: its actor is gone: ", words)
    assert re.search(r"^on \S+ \([\d.]+\), with exit status 1$", words, re.MULTILINE)
    assert "The actor is dead because its worker process has died" in words
    assert caught.value.rank == 1
    # Nothing is left of it in the cluster.
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU") != room and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ray.available_resources()["CPU"] == room
    folders = [Path((tmp_path / str(rank)).read_text()).parent for rank in range(2)]
    assert folders[0].parent.name.startswith("torchweft-ray-")
    assert not any(folder.exists() for folder in folders)


def test_no_room(connection: str) -> None:
    launcher = "ray:cpus_per_rank=2,timeout=0.3"
    fabric = Fabric(devices=2, accelerator="cpu", num_nodes=2, launcher=launcher)
    with pytest.raises(NotAvailable) as caught:
        fabric.launch(work)
    assert re.fullmatch(
        r"Ray had no room within 0\.3 s for 2 nodes with 4 CPU each \(num_nodes=2, devices=2, "
        r"cpus_per_rank=2\); the cluster has 2 nodes \([\d.]+: 2 CPU; [\d.]+: 2 CPU\), of which "
        r"4 CPU are free; ask for fewer devices or nodes or for less per rank "
        r"\(launcher='ray:cpus_per_rank=…'\), add nodes, or wait longer "
        r"\(launcher='ray:timeout=…'\)",
        str(caught.value),
    )


def test_a_folder_that_is_not_seen_and_may_not_be_copied(
    connection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc")  # nobody can show there that it is the same for all
    launcher = "ray:copy_folder=false"
    fabric = Fabric(devices=2, accelerator="cpu", launcher=launcher)
    with pytest.raises(NotAvailable) as caught:
        fabric.launch(work)
    assert "launcher='ray:copy_folder=false' was asked for, and node " in str(caught.value)
    assert "does not see the folder /proc; share it between all nodes" in str(caught.value)


def test_two_connections(connection: str) -> None:
    fabric = Fabric(devices=2, accelerator="cpu", launcher="ray:address=1.2.3.4:5")
    with pytest.raises(
        Misuse, match=r"was given address='1\.2\.3\.4:5', and the script has called"
    ):
        fabric.launch(work)


def test_a_script_is_needed_without_a_function(connection: str) -> None:
    with pytest.raises(Misuse, match="and here pytest runs; pass the training function to"):
        Fabric(devices=2, accelerator="cpu", launcher="ray").launch()


def test_what_cannot_be_handed_over(connection: str) -> None:
    fabric = Fabric(devices=2, accelerator="cpu", launcher="ray")
    lock = threading.Lock()
    with pytest.raises(Misuse, match=r"cannot be given the function test_what_.*\(\), which"):
        fabric.launch(lambda fabric: lock)
    with pytest.raises(
        Misuse, match=r"cannot be given the argument <unlocked _thread\.lock object"
    ):
        fabric.launch(lambda fabric, argument: None, lock)
