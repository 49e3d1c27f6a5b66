"""``docs/xla.md``: its script, its commands, and its tables."""

from __future__ import annotations

import re
from pathlib import Path

from tests.pages import Runner, blocks, environment
from torchweft import Fabric
from torchweft_xla import hooks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "xla.md"
TEXT = PAGE.read_text("utf-8")


def test_its_script_and_its_commands(tmp_path: Path) -> None:
    runner = Runner(tmp_path, environment())
    for block in blocks(PAGE):
        if block.file or block.word in ("console", "pycon"):
            runner.run(block)


def test_every_strategy_has_a_column_and_every_name_is_there(monkeypatch) -> None:
    names = {spec.name for spec in hooks.torchweft_strategies()}
    header = re.search(r"^\| \| (`xla` .*)\|$", TEXT, re.MULTILINE)
    assert header
    assert set(re.findall(r"`(\w+)`", header[1])) == names
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    for specs in (hooks.torchweft_strategies(), hooks.torchweft_accelerators()):
        for name in (name for spec in specs for name in spec.names()):
            assert f"`{name}`" in TEXT
    for precision in ("32-true", "bf16-mixed", "bf16-true", "16-true"):
        assert f"`{precision}`" in TEXT
        assert Fabric(accelerator="xla", precision=precision).plan.precision.name == precision


def test_what_the_readme_s_table_says_is_declared() -> None:
    rows = re.findall(
        r"^\| (\w+) \| `(.+?)` \| (.*?) \|",
        (ROOT / "plugins" / "xla" / "README.md").read_text("utf-8"),
        flags=re.MULTILINE,
    )
    declared = [
        (spec.kind, spec.name, ", ".join(f"`{name}`" for name in spec.names()[1:]))
        for found in (
            hooks.torchweft_accelerators(),
            hooks.torchweft_strategies(),
            hooks.torchweft_precisions(),
            hooks.torchweft_launchers(),
        )
        for spec in found
    ]
    assert rows == declared
