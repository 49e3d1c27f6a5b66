"""``torchweft plugins`` as a process, with real packages beside the installed ones."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from torchweft import __version__

LONG_REASON = (
    "the loom's control library liblooms.so.7 was found in /opt/a/rather/long/path/to/loom/lib, "
    "but it answers with protocol 3, and this plugin speaks protocols 5 to 7 alone"
)

ACME = f"""
from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec, Availability, Preset, StrategySpec

@hookimpl
def torchweft_accelerators():
    return [AcceleratorSpec(name="loom", target="acme_impl:Loom", device="loom",
                            summary="looms of acme", aliases=("weaver",), probe="acme:probe")]

@hookimpl
def torchweft_strategies():
    return [StrategySpec(name="weave", target="acme_impl:Weave", summary="threads crossed",
                         presets=(Preset(alias="weave_tight", options={{"tight": True}}),))]

def probe():
    return Availability(ok=False, reason={LONG_REASON!r}, hint="upgrade acme's driver")
"""

RIVAL = """
from torchweft.hookspecs import hookimpl
from torchweft.specs import StrategySpec

@hookimpl
def torchweft_strategies():
    return [StrategySpec(name="weave", target="rival_impl:Weave")]
"""

LISTENER = """
from torchweft.hookspecs import hookimpl

@hookimpl
def torchweft_check_plan(plan):
    return []
"""


def install(folder: Path, module: str, version: str, code: str) -> None:
    """What an installer leaves: a module and its metadata with an entry point."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"torchweft_{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torchweft-{module}\nVersion: {version}\n"
    )
    (info / "entry_points.txt").write_text(f"[torchweft]\n{module} = {module}\n")


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    install(tmp_path, "acme", "0.3", ACME)
    install(tmp_path, "rival", "2.0", RIVAL)
    install(tmp_path, "listener", "1.0", LISTENER)
    install(tmp_path, "torn", "0.1", "import torn_library")
    return tmp_path


def environment(packages: Path | None = None, **extra: str) -> Mapping[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHWEFT_")}
    path = {"PYTHONPATH": str(packages)} if packages else {}
    return {**kept, **path, **extra}


def plugins(*args: str, packages: Path | None = None, **extra: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torchweft", "plugins", *args],
        env=environment(packages, **extra),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def on_terminal(packages: Path, columns: int, **extra: str) -> str:
    """What a terminal of so many columns is sent."""
    reader, writer = pty.openpty()
    settings = {"COLUMNS": str(columns), "TERM": "xterm-256color", "NO_COLOR": "", **extra}
    with subprocess.Popen(
        [sys.executable, "-m", "torchweft", "plugins"],
        env=environment(packages, **settings),
        stdin=writer,
        stdout=writer,
        stderr=writer,
    ) as process:
        os.close(writer)
        pieces = []
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # Linux says so when the other side was closed
                break
            if not piece:
                break
            pieces.append(piece)
        os.close(reader)
        assert process.wait(timeout=60) == 0
    return b"".join(pieces).decode().replace("\r\n", "\n")


def line_of(text: str, kind: str, name: str, provider: str = "") -> str:
    (line,) = (
        line
        for line in text.splitlines()
        if re.match(rf"{kind} +{re.escape(name)} ", line) and provider in line
    )
    return line


def test_the_built_in_names_are_listed() -> None:
    shown = plugins()
    assert shown.splitlines()[0].split("  ")[0] == "KIND"
    cpu = line_of(shown, "accelerator", "cpu")
    assert re.match(rf"accelerator +cpu +yes +torchweft {re.escape(__version__)} ", cpu)
    assert "; also: 32" in line_of(shown, "precision", "32-true", "  torchweft 0.")
    for kind, name in [
        ("strategy", "single_device"),
        ("precision", "bf16-mixed"),
        ("launcher", "spawn"),
        ("launcher", "torchrun"),
    ]:
        assert " yes " in line_of(shown, kind, name, "  torchweft 0.")


def test_who_provides_a_name_and_why_it_is_not_here(packages: Path) -> None:
    line = line_of(plugins(packages=packages), "accelerator", "loom")
    assert re.match(r"accelerator +loom +no +torchweft-acme 0\.3 ", line)
    assert line.endswith(
        f"looms of acme; also: weaver; why not: {LONG_REASON}; what to do: upgrade acme's driver"
    )


def test_a_clash_is_marked_on_both_sides(packages: Path) -> None:
    shown = plugins(packages=packages)
    acme = line_of(shown, "strategy", "weave", "torchweft-acme 0.3  ")
    rival = line_of(shown, "strategy", "weave", "torchweft-rival 2.0  ")
    assert re.match(r"strategy +weave +clash ", acme)
    assert re.match(r"strategy +weave +clash ", rival)
    assert "also: weave_tight; clash: 'weave' is also declared by torchweft-rival 2.0" in acme
    assert rival.endswith(
        "clash: 'weave' is also declared by torchweft-acme 0.3; what to do: uninstall one of "
        "them, or set TORCHWEFT_DISABLE_PLUGINS to the plugin that you do not want"
    )


def test_a_broken_plugin_is_listed_with_its_error(packages: Path) -> None:
    shown = plugins(packages=packages)
    assert re.match(r"plugin +torn +broken +torchweft-torn 0\.1 ", line_of(shown, "plugin", "torn"))
    assert line_of(shown, "plugin", "torn").endswith(
        "failed to load: ModuleNotFoundError: No module named 'torn_library'; what to do: upgrade "
        "or uninstall torchweft-torn, or set TORCHWEFT_DISABLE_PLUGINS=torn"
    )


def test_every_plugin_is_listed(packages: Path) -> None:
    shown = plugins(packages=packages)
    assert line_of(shown, "plugin", "acme").endswith("declares 1 accelerator, 1 strategy")
    assert line_of(shown, "plugin", "listener").endswith("declares nothing to choose, hooks only")


def test_a_disabled_plugin_is_off_and_its_names_are_gone(packages: Path) -> None:
    shown = plugins(packages=packages, TORCHWEFT_DISABLE_PLUGINS="torn,rival")
    torn = line_of(shown, "plugin", "torn")
    assert re.match(
        r"plugin +torn +off +torchweft-torn 0\.1 +disabled by TORCHWEFT_DISABLE_PLUGINS$", torn
    )
    assert "torn_library" not in shown
    assert re.match(r"strategy +weave +yes +torchweft-acme", line_of(shown, "strategy", "weave"))


def test_the_traceback_of_a_broken_plugin_is_shown_when_asked_for(packages: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torchweft", "plugins"],
        env=environment(packages, TORCHWEFT_TRACE="1"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Traceback (most recent call last):" in done.stderr
    assert 'torn.py", line 1' in done.stderr


def test_a_disabled_name_that_is_not_installed_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torchweft", "plugins"],
        env=environment(TORCHWEFT_DISABLE_PLUGINS="bultin"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(
        "error: the environment variable TORCHWEFT_DISABLE_PLUGINS names 'bultin', and no plugin "
        "that is installed is called that; did you mean 'builtin'? installed: builtin"
    )
    assert done.stderr.count("\n") == 1


def test_json_has_the_documented_keys(packages: Path) -> None:
    document = json.loads(plugins("--json", packages=packages))
    assert set(document) == {"plugins", "rows"}
    by_name = {plugin["name"]: plugin for plugin in document["plugins"]}
    assert by_name["acme"] == {
        "name": "acme",
        "distribution": "torchweft-acme",
        "version": "0.3",
        "error": "",
        "disabled": False,
    }
    assert by_name["torn"]["error"] == "ModuleNotFoundError: No module named 'torn_library'"
    (loom,) = (row for row in document["rows"] if row["name"] == "loom")
    assert loom == {
        "kind": "accelerator",
        "name": "loom",
        "aliases": ["weaver"],
        "provider": "torchweft-acme 0.3",
        "summary": "looms of acme",
        "available": False,
        "reason": LONG_REASON,
        "hint": "upgrade acme's driver",
        "clash": "",
    }


def test_a_disabled_plugin_is_said_to_be_in_json(packages: Path) -> None:
    shown = plugins("--json", packages=packages, TORCHWEFT_DISABLE_PLUGINS="acme")
    document = json.loads(shown)
    disabled = {plugin["name"]: plugin["disabled"] for plugin in document["plugins"]}
    assert disabled["acme"] is True
    assert disabled["rival"] is False
    assert "torchweft-acme 0.3" not in {row["provider"] for row in document["rows"]}


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_a_terminal_shows_everything_and_nothing_too_wide(packages: Path, columns: int) -> None:
    coloured = on_terminal(packages, columns)
    assert "\x1b[" in coloured
    shown = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert max(len(line) for line in shown.splitlines()) <= columns
    assert "…" not in shown
    for heading in ("Accelerators", "Strategies", "Precisions", "Launchers", "Plugins"):
        assert re.search(rf"^{heading} *$", shown, re.MULTILINE)
    # A cell is folded, even inside a word that is longer than its column; no letter is lost.
    offset = shown.splitlines()[0].index("About")
    about = "".join(line[offset:] for line in shown.splitlines())
    letters = re.sub(r"\s", "", about)
    assert re.sub(r"\s", "", f"why not: {LONG_REASON}what to do: upgrade acme's driver") in letters
    assert re.sub(r"\s", "", "clash: 'weave' is also declared by torchweft-acme 0.3") in letters
    assert re.sub(r"\s", "", "No module named 'torn_library'") in letters


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colours_is_sent_none(packages: Path, variable: str, value: str) -> None:
    shown = on_terminal(packages, 80, **{variable: value})
    assert "\x1b" not in shown
    assert re.search(r"^weave +clash +torchweft-acme", shown, re.MULTILINE)


def test_aliases_have_a_line_of_their_own_on_a_terminal(packages: Path) -> None:
    shown = on_terminal(packages, 80, NO_COLOR="1")
    assert re.search(r"^ +also: weaver *$", shown, re.MULTILINE)


def test_it_imports_neither_torch_nor_rich_in_a_pipe() -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from torchweft.cli import main\n"
        "main(['plugins'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    imported = set(done.stderr.split())
    assert "torchweft.cli.plugins" in imported
    assert not {"torch", "rich", "numpy", "torchweft.resolve"} & imported
