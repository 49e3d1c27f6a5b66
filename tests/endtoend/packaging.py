"""Wheels built from a copy of the tree, and fresh environments to install them into.

Nothing here needs a network: what the packages depend on is taken from the environment that runs
the tests, and nothing else of it can be seen, so that a dependency that nobody declared is missed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn

from tests.endtoend.commands import Result, clean_environment

ROOT = Path(__file__).parents[2]
THIRD_PARTY = ROOT / "tests" / "thirdparty"

#: A script that trains and checks that all processes end with the same parameters.
TRAIN = THIRD_PARTY / "train.py"

_KEY = pytest.StashKey["Built"]()

#: Left by other work in the tree; none of it belongs into a distribution.
_NOT_COPIED = re.compile(r"\.(?!gitignore$).*|__pycache__|build|dist|demo-run")


@dataclass(frozen=True, kw_only=True)
class Built:
    """Everything that was built, once for all tests of a session.

    Attributes:
        tree: the copy of the repository that it was built from.
        core, cuda, deepspeed: folders with a wheel and a source archive, the wheel made from the
            archive.
        direct: a folder with the wheels of all of them, made from the tree itself.
        acme, broken, clash, localsgd: folders with the wheels of third parties.
        dependencies: a folder with what core and plugins depend on, and without these.
    """

    tree: Path
    core: Path
    cuda: Path
    deepspeed: Path
    direct: Path
    acme: Path
    broken: Path
    clash: Path
    localsgd: Path
    dependencies: Path


def build_once(config: pytest.Config, new_folder: Callable[[str], Path]) -> Built:
    """What was built in this session; the first call builds."""
    if _KEY not in config.stash:
        config.stash[_KEY] = _build(new_folder("built"))
    return config.stash[_KEY]


def _build(folder: Path) -> Built:
    tree = folder / "tree"
    copytree(ROOT, tree, ignore=_ignored)
    _leave_litter(tree)
    homes = {"core": tree, **{name: tree / "plugins" / name for name in ("cuda", "deepspeed")}}
    third = tree / "tests" / "thirdparty"
    strangers = ("acme", "broken", "clash", "localsgd")
    built = {name: folder / name for name in (*homes, "direct", *strangers)}
    jobs: list[Sequence[str | Path]] = [
        *((home, "--outdir", built[name]) for name, home in homes.items()),
        *((home, "--wheel", "--outdir", built["direct"]) for home in homes.values()),
        *((third / f"torchweft-{name}", "--wheel", "--outdir", built[name]) for name in strangers),
    ]
    with ThreadPoolExecutor(2) as pool:
        linked = pool.submit(link_dependencies, ROOT_NAMES, folder / "dependencies")
        list(pool.map(_build_one, jobs))
        dependencies = linked.result()
    return Built(tree=tree, dependencies=dependencies, **built)


def _ignored(folder: str, names: list[str]) -> set[str]:
    environments = {name for name in names if Path(folder, name, "pyvenv.cfg").exists()}
    return environments | {name for name in names if _NOT_COPIED.fullmatch(name)}


def _leave_litter(tree: Path) -> None:
    """What lies about in a tree that somebody works in; a distribution must not have it."""
    for package in (
        "core/torchweft",
        "plugins/cuda/torchweft_cuda",
        "plugins/deepspeed/torchweft_deepspeed",
    ):
        cache = tree / package / "__pycache__"
        cache.mkdir()
        (cache / "hooks.cpython-311.pyc").write_bytes(b"")
    (tree / "dist").mkdir()
    (tree / "dist" / "torchweft-0.0.1-py3-none-any.whl").write_bytes(b"")


def _build_one(arguments: Sequence[str | Path]) -> None:
    # Without isolation, because an isolated build installs its requirements from an index.
    _call(sys.executable, "-m", "build", "--no-isolation", *arguments)


def _call(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- dependencies ------------------------------------------------------------------------------

#: The distributions whose dependencies are made visible, and which are not visible themselves.
ROOT_NAMES = ("torchweft", "torchweft-cuda", "torchweft-deepspeed")


def link_dependencies(roots: Iterable[str], folder: Path) -> Path:
    """Fill a new folder with links to all that ``roots`` need to run, but not to ``roots``."""
    folder.mkdir()
    hidden = {canonicalize_name(name) for name in roots}
    for name in _closure(hidden) - hidden:
        found = distribution(name)
        assert found.files, f"{name} does not say which files it has"
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            link = folder / top
            # Distributions may share a folder, as those of NVIDIA's libraries do.
            if not link.exists():
                link.symlink_to(str(found.locate_file(top)))
    return folder


def _closure(roots: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    left = set(roots)
    while left:
        name = left.pop()
        seen.add(name)
        requirements = [Requirement(text) for text in distribution(name).requires or ()]
        needed = {
            canonicalize_name(requirement.name)
            for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        }
        left |= needed - seen
    return seen


# -- environments ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """A virtual environment in which torchweft is what was installed there and nothing else."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def command(self) -> Path:
        """The script ``torchweft`` that the wheel's entry point made."""
        return self.folder / "bin" / "torchweft"

    def install(self, *requirements: str | Path, find_links: Sequence[Path] = ()) -> str:
        """Install wheels by path, or by name from ``find_links``, dependencies checked."""
        places = [word for place in find_links for word in ("--find-links", str(place))]
        pip = [sys.executable, "-m", "pip", "--isolated", "--python", str(self.python)]
        options = ["--no-index", "--no-cache-dir", "--disable-pip-version-check"]
        return _call(*pip, "install", *options, *places, *requirements)

    def environ(self, **extra: str) -> dict[str, str]:
        """For commands in this environment: nothing of the outer one leaks in by a variable."""
        return {"PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", **extra}

    def plugins(self, run: Callable[..., Result], **extra: str) -> Any:
        """What ``torchweft plugins --json`` says."""
        result = run(self.command, "plugins", "--json", environ=self.environ(**extra))
        assert (result.status, result.err) == (0, ""), result.out + result.err
        return json.loads(result.out)


def make_fresh(folder: Path, dependencies: Path) -> Fresh:
    """An environment with the dependencies and nothing more, not even pip."""
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return Fresh(folder=folder)


def make_testing(fresh: Fresh, folder: Path) -> None:
    """Make pytest visible in an environment; ``folder`` is a new one for what it needs."""
    # Whoever needs pytest-timeout needs pytest.
    linked = link_dependencies(["pytest-timeout"], folder)
    (packages,) = fresh.folder.glob("lib/python3*/site-packages")
    (packages / "testing.pth").write_text(f"{linked}\n")


# -- what training has to end with -------------------------------------------------------------


def trained_alone() -> dict[str, torch.Tensor]:
    """The parameters that TRAIN should end with, by a loop without torchweft."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 6, dtype=torch.float64, generator=generator)
    y = torch.randn(64, 3, dtype=torch.float64, generator=generator)
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(6, 16, dtype=torch.float64),
        nn.Tanh(),
        nn.Linear(16, 3, dtype=torch.float64),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(2):
        for first in range(0, 64, 8):
            optimizer.zero_grad()
            batch = slice(first, first + 8)
            nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            # Otherwise nothing would be clipped, and a wrong norm would go unnoticed.
            assert norm > 0.5
            optimizer.step()
    return model.state_dict()


def distance(path: Path, expected: Mapping[str, torch.Tensor], ranks: int = 2) -> float:
    """The largest difference between what TRAIN wrote and the ``expected`` parameters."""
    saved = torch.load(path, weights_only=True)
    assert saved["ranks"] == ranks
    assert list(saved["model"]) == list(expected)
    return max(
        (saved["model"][name] - value).abs().max().item() for name, value in expected.items()
    )


def only(folder: Path, pattern: str) -> Path:
    """The one file of that name in a folder."""
    (found,) = folder.glob(pattern)
    return found
