"""The distribution: what is in it, and what it says of itself."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[2]
HOME = ROOT / "plugins" / "xla"


def test_the_wheel(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), HOME],
        check=True,
        capture_output=True,
        timeout=100,
    )
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist()}
    modules = {f"torchweft_xla/{p.name}" for p in (HOME / "torchweft_xla").glob("*.py")}
    found = {name for name in files if not name.startswith("torchweft_xla-")}
    assert found == modules | {"torchweft_xla/py.typed"}
    (home,) = {name.partition("/")[0] for name in files} - {"torchweft_xla"}
    metadata = Metadata.from_email(files[f"{home}/METADATA"])
    assert metadata.name == "torchweft-xla"
    # Those for which there are wheels of torch-xla.
    assert str(metadata.requires_python) == "<3.14,>=3.10"
    assert metadata.license_expression == "Apache-2.0"
    needed = {r.name: str(r.specifier) for r in metadata.requires_dist or ()}
    pins = dict(
        line.split("==") for line in (ROOT / "constraints-xla.txt").read_text().splitlines() if line
    )
    assert needed == {
        "torchweft": "<0.2,>=0.1.0",
        **{name: f"=={version}" for name, version in pins.items()},
    }
    entries = files[f"{home}/entry_points.txt"].decode().split()
    assert entries == ["[torchweft]", "xla", "=", "torchweft_xla.hooks"]
