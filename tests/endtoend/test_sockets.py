"""On one node nothing listens where another computer could reach it."""

from __future__ import annotations

import ipaddress
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.endtoend.commands import ways

BODY = """
import os, sys, time
from pathlib import Path
import torch
from torchweft import Fabric

fabric = Fabric(accelerator="cpu", devices=os.environ.get("DEVICES", "auto"), strategy="ddp")
fabric.launch()
model, optimizer = torch.nn.Linear(2, 2), None
model = fabric.setup(model)
fabric.backward(model(torch.ones(1, 2)).sum())
fabric.barrier()
folder = Path(sys.argv[1])
(folder / str(fabric.global_rank)).touch()
while not (folder / "go on").exists():
    time.sleep(0.02)
"""


@pytest.mark.parametrize("way", ["python", "torchweft run", "no preload"])
def test_nothing_listens_beyond_loopback(way: str, start, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(BODY)
    environ = {"DEVICES": "2"} if way == "python" else {}
    command = start(*ways(script)[way], tmp_path, environ=environ)
    while not all((tmp_path / str(rank)).exists() for rank in (0, 1)):
        assert command.popen.poll() is None, command.finish().err
        time.sleep(0.02)
    listening = [
        (process.pid, connection.laddr.ip)
        for process in command.processes()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    (tmp_path / "go on").touch()
    result = command.finish()
    assert result.status == 0, result.err
    # The store, and gloo in each of the two ranks.
    assert len(listening) >= 3
    assert {ip for _, ip in listening if not ipaddress.ip_address(ip).is_loopback} == set()
    assert sys.platform == "linux"
