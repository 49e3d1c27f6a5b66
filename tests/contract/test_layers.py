"""Who may import whom: the contracts in ``pyproject.toml``, and that they hold what they say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.api import read_configuration

ROOT = Path(__file__).parents[2]
#: What a plugin may import of torchweft.
PUBLIC = {"api", "errors", "hookspecs", "launching", "loggers", "specs", "testing"}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from importlinter.cli import lint_imports; "
        "sys.exit(lint_imports(no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        # It is installed in an environment of its own alone.
        env={**os.environ, "PYTHONPATH": str(folder / "plugins" / "xla")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """All packages and the contracts, to be broken."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in (
        "core/torchweft",
        "plugins/cuda/torchweft_cuda",
        "plugins/deepspeed/torchweft_deepspeed",
        "plugins/ray/torchweft_ray",
        "plugins/xla/torchweft_xla",
    ):
        shutil.copytree(
            ROOT / package,
            tmp_path / Path(package).name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return tmp_path


def test_the_contracts_are_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("torchweft/specs.py", "import torchweft.plan", "The core is layered"),
        ("torchweft/api/batch.py", "from torchweft import fabric", "The core is layered"),
        ("torchweft/somewhere_new.py", "", "The core is layered"),
        ("torchweft/catalog.py", "import torch", "Nothing that decides what to run imports torch"),
        (
            "torchweft/fabric.py",
            "import torchweft_cuda",
            "The core imports no plugin and no backend library",
        ),
        (
            "torchweft_cuda/ddp.py",
            "from torchweft import manager",
            "A plugin imports nothing private",
        ),
        (
            "torchweft_deepspeed/requests.py",
            "import torch",
            "Nothing that decides what to run imports torch",
        ),
        (
            "torchweft_xla/probe.py",
            "import torch_xla",
            "Nothing that decides what to run imports torch",
        ),
        (
            "torchweft_deepspeed/engine.py",
            "import torchweft_cuda",
            "A plugin imports no other plugin",
        ),
    ],
)
def test_a_contract_that_is_broken_is_noticed(
    copied: Path, module: str, line: str, contract: str
) -> None:
    with (copied / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = lint(copied)
    assert done.returncode == 1, done.stdout
    assert f"{contract} BROKEN" in " ".join(done.stdout.split())


def test_everything_private_is_forbidden_to_plugins() -> None:
    contracts = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    forbidden = next(c["forbidden_modules"] for c in contracts if c["id"] == "public-door")
    modules = {
        path.stem
        for path in (ROOT / "core" / "torchweft").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    private = {f"torchweft.{name}" for name in modules - PUBLIC - {"__init__", "__main__"}}
    assert private == set(forbidden)
