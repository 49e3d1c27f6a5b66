"""``docs/deepspeed.md``: every code block, the tables, and what goes on from DeepSpeed."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pages import Runner, blocks, environment
from torchweft import Fabric
from torchweft_deepspeed.requests import OWNED
from torchweft_deepspeed.strategy import DeepSpeedStrategy

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "deepspeed.md"
TEXT = PAGE.read_text("utf-8")

#: A script that calls DeepSpeed itself; a strategy makes its processes.
THEIRS = """
import deepspeed, torch
from torchweft import Fabric
from train import Model

if __name__ == "__main__":
    fabric = Fabric()
    fabric.launch()
    model = Model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}},
    )
    x = torch.randn(4, 8, 64)
    engine.backward(engine(x, x[..., :1]))
    engine.step()
    engine.save_checkpoint("theirs", client_state={"epoch": 10})
    engine.destroy()
"""


def _run(folder: Path, script: str) -> str:
    flags = ["--accelerator", "cpu", "--devices", "2", "--strategy", "deepspeed_stage_2"]
    done = subprocess.run(
        [sys.executable, "-m", "torchweft", "run", *flags, script],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(400)
def test_every_code_block_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TORCHWEFT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runner = Runner(tmp_path, environment())
    for block in blocks(PAGE):
        runner.run(block)
    (tmp_path / "theirs.py").write_text(THEIRS)
    _run(tmp_path, "theirs.py")
    assert _run(tmp_path, "resume.py") == "{'epoch': 10}\n"
    content = torch.load(tmp_path / "theirs.ckpt", weights_only=True)
    assert content["epoch"] == 10
    assert content["optimizer"]["state"]["head.weight"]["step"].item() == 1


def test_the_table_has_all_options_and_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\S+)` \| \w", TEXT, re.MULTILINE)
    options = inspect.signature(DeepSpeedStrategy).parameters.values()
    assert rows == [(option.name, repr(option.default)) for option in options]


def test_the_table_has_what_follows_from_the_script() -> None:
    (table,) = re.findall(r"\| in DeepSpeed's configuration .*?\n\n", TEXT, re.DOTALL)
    named = set(re.findall(r"`(\w+)`", table.partition("|---|")[2]))
    assert {
        name for name in OWNED if name not in ("bfloat16", "managed_gradient_accumulation")
    } <= (named)


def test_the_strategies_of_the_tables_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    # Without the sessions, which show what is refused.
    text = re.sub(r"```pycon\n.*?```", "", TEXT, flags=re.DOTALL)
    names = set(re.findall(r"\"(deepspeed[\w:=.,/]*)\"", text)) | {"deepspeed_stage_3_offload"}
    assert len(names) > 8
    for name in sorted(names):
        Fabric(accelerator="cpu", devices=2, strategy=name)
    made = re.findall(r"`(DeepSpeedStrategy\((?:[^`…]+)\))`[ ,;|]", text)
    assert len(made) > 3
    for each in made:
        strategy = eval(each, {"DeepSpeedStrategy": DeepSpeedStrategy})
        Fabric(accelerator="cpu", devices=2, strategy=strategy)
    for each in re.findall(r"`(Fabric\([^`…]*strategy=[^`…]*\))`", text):
        eval(each, {"DeepSpeedStrategy": DeepSpeedStrategy, "Fabric": Fabric})


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https)([^)#]+)", TEXT):
        assert (DOCS / target).exists(), target
