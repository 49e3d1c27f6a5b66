"""Scripts with a command line of their own, by argparse, click or hydra, are left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TRAIN = """
from torchweft import Fabric


def train(devices, rate):
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp")
    fabric.launch()
    # In one piece, as lines of two processes may otherwise run into each other.
    line = f"{fabric.global_rank} {fabric.world_size} {rate}"
    print(line + chr(10), end="", flush=True)

"""

ARGPARSE = """
import argparse

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--rate", type=float)
    options = parser.parse_args()
    train(options.devices, options.rate)
"""

CLICK = """
import click

@click.command()
@click.option("--devices", default="auto")
@click.option("--rate", type=float)
def main(devices, rate):
    train(devices, rate)

if __name__ == "__main__":
    main()
"""

HYDRA = """
import hydra

@hydra.main(version_base=None, config_path=None)
def main(config):
    train(config.get("devices", "auto"), config.rate)

if __name__ == "__main__":
    main()
"""

RUN = [sys.executable, "-m", "torchweft", "run"]


@pytest.mark.parametrize(
    ("script", "spelled"),
    [(ARGPARSE, "--{}={}"), (CLICK, "--{}={}"), (HYDRA, "+{}={}")],
    ids=["argparse", "click", "hydra"],
)
def test_a_script_with_its_own_command_line(script: str, spelled: str, run, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(TRAIN + script)
    rate, devices = spelled.format("rate", 0.5), spelled.format("devices", 2)
    for command in (
        [sys.executable, path, rate, devices],
        [*RUN, "--devices", "2", path, rate],
        [*RUN, path, "--", rate, devices],
    ):
        result = run(*command, cwd=tmp_path)
        assert sorted(result.lines) == ["0 2 0.5", "1 2 0.5"], result.err
        assert (result.status, result.err) == (0, "")
