"""``torchweft checkpoint``: what is in one, and another form of it."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from torchweft import Fabric
from torchweft.cli.checkpoint import checkpoint
from torchweft.errors import CheckpointError, InvalidRequest, NotAvailable


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("part", self.turned[:1])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder and a file of the same."""
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    state = {
        "model": model,
        "optimizer": optimizer,
        "ema": {"weight": torch.ones(3, 4).half()},
        "step": 7,
        "name": "x" * 70,
        "scheduler": {"last_epoch": 3},
    }
    fabric.save(tmp_path / "step7", state)
    fabric.save(tmp_path / "step7.pt", state)
    return tmp_path / "step7"


def invoke(*arguments: str | Path, raises: bool = False) -> Result:
    result = CliRunner().invoke(checkpoint, [str(argument) for argument in arguments])
    if not raises and result.exception is not None and result.exit_code == 1:
        raise result.exception
    return result


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return bool(torch.equal(one, other) and one.dtype == other.dtype)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


# -- inspect -------------------------------------------------------------------------------------

TABLE = """\
KEY        KIND       TENSORS  ELEMENTS  SIZE   DTYPES   VALUE
model      model      2        15        60 B   float32
optimizer  optimizer  6        32        128 B  float32  1 group, lr 0.01; exp_avg, exp_avg_sq, step
ema        tensors    1        12        24 B   float16
step       value                                         7
name       value                                         xxx"""


def test_inspect_says_what_there_is(saved: Path) -> None:
    lines = invoke("inspect", saved).output.splitlines()
    assert re.fullmatch(rf"checkpoint {re.escape(str(saved))}, a folder of \d+\.\d kB", lines[0])
    assert re.fullmatch(r"written by torchweft \S+, torch \S+", lines[1])
    assert lines[2:4] == ["on         1 process, single_device, 32-true", ""]
    assert "\n".join(lines[4:]).startswith(TABLE)
    assert lines[-2].endswith(f" {'x' * 57}...")
    assert lines[-1].endswith(" dict of last_epoch")


def test_a_file_is_shown_alike(saved: Path) -> None:
    folder = invoke("inspect", saved).output.splitlines()
    file = invoke("inspect", f"{saved}.pt").output.splitlines()
    assert file[2:] == folder[4:]
    assert re.fullmatch(r"checkpoint .*/step7\.pt, a file of \d\.\d kB", file[0])


def test_every_tensor_is_shown_on_request(saved: Path) -> None:
    output = invoke("inspect", saved, "--tensors").output
    assert "\nTENSOR         SHAPE   DTYPE\nmodel: weight  (3, 4)  float32\n" in output
    assert re.search(r"\noptimizer: 0\.exp_avg +\(3, 4\)  float32\n", output)


def test_inspect_reads_no_tensors_of_a_folder(saved: Path) -> None:
    stored = saved / "__0_0.distcp"
    stored.write_bytes(bytes(stored.stat().st_size))
    assert TABLE in invoke("inspect", saved).output


def test_the_document(saved: Path) -> None:
    document = json.loads(invoke("inspect", saved, "--json").output)
    parts = document.pop("parts")
    assert document == {
        "path": str(saved),
        "form": "folder",
        "bytes": sum(each.stat().st_size for each in saved.iterdir()),
        "torchweft": document["torchweft"],
        "torch": torch.__version__,
        "world_size": 1,
        "strategy": "single_device",
        "precision": "32-true",
        "format": 1,
    }
    assert parts[0] == {
        "key": "model",
        "kind": "model",
        "count": 2,
        "names": 2,
        "elements": 15,
        "bytes": 60,
        "dtypes": {"float32": 2},
        "tensors": [
            {"name": "weight", "shape": [3, 4], "dtype": "float32"},
            {"name": "bias", "shape": [3], "dtype": "float32"},
        ],
    }
    assert parts[1]["lr"] == [0.01]
    assert parts[1]["groups"] == 1
    assert parts[1]["state"] == ["exp_avg", "exp_avg_sq", "step"]
    assert parts[3] == {"key": "step", "kind": "value", "value": 7}
    file = json.loads(invoke("inspect", f"{saved}.pt", "--json").output)
    assert file["parts"] == parts
    assert (file["form"], file["world_size"]) == ("file", None)


def test_a_tied_weight_counts_once(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer = torch.optim.SGD((model := Tied()).parameters(), momentum=0.9, lr=0.1)
    model.head(model.embed.weight).sum().backward()
    optimizer.step()
    ema = {"a": torch.empty(0), "b": torch.ones(2)}
    state = {"model": model, "optimizer": optimizer, "ema": ema}
    for name in ("x", "x.pt"):
        fabric.save(tmp_path / name, state)
        output = invoke("inspect", tmp_path / name).output
        assert re.search(r"\nmodel +model +3 +32 +128 B +float32 +4 names\n", output), output
        assert re.search(r"\nema +tensors +2 +2 +8 B +float32\n", output), output
        part = json.loads(invoke("inspect", tmp_path / name, "--json").output)["parts"][0]
        assert (part["count"], part["names"], part["dtypes"]) == (3, 4, {"float32": 3})
        assert len(part["tensors"]) == 4


def test_a_file_of_one_state_alone(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pt")
    assert "\n(all of it)  model " in invoke("inspect", tmp_path / "x.pt").output
    torch.save(torch.ones(2, 3), tmp_path / "x.pt")
    assert invoke("inspect", tmp_path / "x.pt").output.endswith("tensor of float32, 2x3\n")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint '.*/x'; "):
        invoke("inspect", tmp_path / "x")


def test_a_terminal_gets_a_table(saved: Path) -> None:
    reader, writer = pty.openpty()
    code = "from torchweft.cli.checkpoint import checkpoint; checkpoint()"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, "inspect", str(saved)],
        env={**os.environ, "COLUMNS": "120", "TERM": "xterm-256color"},
        stdin=writer,
        stdout=writer,
        stderr=writer,
    ) as process:
        os.close(writer)
        output = b""
        while True:
            try:
                read = os.read(reader, 4096)
            except OSError:
                break
            if not read:
                break
            output += read
    os.close(reader)
    assert process.returncode == 0, output
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output.decode())
    assert re.search(r"Key +Kind +Tensors +Elements +Size +Dtypes +Value", plain)
    assert "────" in plain


def test_the_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from torchweft.cli.checkpoint import checkpoint\n"
        "try: checkpoint(['inspect', '--help'])\n"
        "finally: assert not {'torch', 'rich', 'numpy'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no code from the checkpoint is run" in ended.stdout


# -- consolidate ---------------------------------------------------------------------------------


def test_a_folder_becomes_the_file(saved: Path) -> None:
    result = invoke("consolidate", saved)
    assert re.fullmatch(rf"wrote {re.escape(str(saved))}\.ckpt, \d\.\d kB\n", result.output)
    made, file = (torch.load(f"{saved}{ending}", weights_only=True) for ending in (".ckpt", ".pt"))
    assert equal(made, file)
    assert made["model"]._metadata == file["model"]._metadata
    invoke("consolidate", f"{saved}/", "--output", saved.parent / "new" / "x.pt")
    assert (saved.parent / "new" / "x.pt").exists()


def test_weights_alone(saved: Path) -> None:
    for path in (saved, saved.with_suffix(".pt")):
        output = saved.parent / "weights" / f"{path.name}.safetensors"
        invoke("consolidate", path, "--output", output)
        weights = torch.load(f"{saved}.pt", weights_only=True)["model"]
        assert equal(dict(weights), load_file(output))
    assert output.stat().st_mode & 0o777 == saved.with_suffix(".pt").stat().st_mode & 0o777
    invoke("consolidate", saved, "--output", output, "--key", "ema")
    assert list(load_file(output)) == ["weight"]


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = Tied()
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "x", {"net": model})
    fabric.save(tmp_path / "x.pt", {"net": model})
    torch.save(model.state_dict(), tmp_path / "raw.pt")
    for name in ("x", "x.pt", "raw.pt"):
        result = invoke("consolidate", tmp_path / name, "--output", tmp_path / "w.safetensors")
        assert "note: 'head.weight' is tied with 'embed.weight', and stored once\n" in result.output
        assert set(load_file(tmp_path / "w.safetensors")) == {"embed.weight", "turned", "part"}
        other = Tied()
        missing = other.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=False)
        assert missing.missing_keys == ["head.weight"]
        assert equal(dict(model.state_dict()), dict(other.state_dict()))
        # As safetensors.torch.save_model notes it for load_model.
        with safe_open(tmp_path / "w.safetensors", "pt") as opened:
            assert opened.metadata() == {"format": "pt", "head.weight": "embed.weight"}


def test_what_cannot_be_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(error: type[Exception], words: str, *arguments: str | Path) -> None:
        with pytest.raises(error, match=f"^{re.escape(words)}"):
            invoke("consolidate", *arguments)

    output = saved.parent / "x.safetensors"
    refused(
        InvalidRequest,
        f"'{saved}.pt' is one file already; to write its model's weights alone, give --output a "
        "name that ends in '.safetensors'",
        f"{saved}.pt",
    )
    refused(
        InvalidRequest,
        "--key chooses the model whose weights are written; give --output a name that ends in "
        f"'.safetensors', not '{saved}.ckpt'",
        *(saved, "--key", "model"),
    )
    refused(
        InvalidRequest,
        f"'{saved}' holds no model 'modle'; did you mean 'model'? choose one by --key: 'model', "
        "'ema'",
        *(saved, "--key", "modle", "--output", output),
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(saved.parent / "two", {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    refused(
        InvalidRequest,
        f"'{saved.parent}/two' holds several models; choose one by --key: 'a', 'b'",
        *(saved.parent / "two", "--output", output),
    )
    fabric.save(saved.parent / "none", {"n": 1})
    refused(
        InvalidRequest,
        f"'{saved.parent}/none' holds no model; it holds 'n'",
        *(saved.parent / "none", "--output", output),
    )
    refused(
        CheckpointError,
        "cannot write '/proc/none/x.safetensors': No such file or directory",
        *(saved, "--output", "/proc/none/x.safetensors"),
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(
        NotAvailable,
        "the package safetensors, which writes files of that suffix, is not installed; try: "
        'pip install "torchweft[safetensors]"',
        *(saved, "--output", output),
    )
    assert not output.exists()
