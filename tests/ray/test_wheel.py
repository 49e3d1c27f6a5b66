"""The distribution: what is in it, and what it says of itself."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

from torchweft_ray.hooks import torchweft_launchers

ROOT = Path(__file__).parents[2]
HOME = ROOT / "plugins" / "ray"


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
    modules = {f"torchweft_ray/{p.name}" for p in (HOME / "torchweft_ray").glob("*.py")}
    found = {name for name in files if not name.startswith("torchweft_ray-")}
    assert found == modules | {"torchweft_ray/py.typed"}
    (home,) = {name.partition("/")[0] for name in files} - {"torchweft_ray"}
    metadata = Metadata.from_email(files[f"{home}/METADATA"])
    assert (metadata.name, metadata.license_expression) == ("torchweft-ray", "Apache-2.0")
    assert {r.name for r in metadata.requires_dist or ()} == {"torchweft", "ray"}
    entries = files[f"{home}/entry_points.txt"].decode().split()
    assert entries == ["[torchweft]", "ray", "=", "torchweft_ray.hooks"]


def test_the_table_has_what_is_declared() -> None:
    text = (HOME / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (launcher) \| `(\w+)` \| (.*?) \|", text, re.MULTILINE)
    declared = [(spec.kind, spec.name, " ".join(spec.aliases)) for spec in torchweft_launchers()]
    assert [(kind, name, also.strip()) for kind, name, also in rows] == declared
