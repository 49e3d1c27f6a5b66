"""The kit for plugins catches what it is for: each fault fails the test that is meant for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

#: One plugin with a spec for each fault, and two that are right.
FAULTY_HOOKS = """
from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, Preset, StrategySpec

def strategy(name, target="Fine", summary="one of many", **fields):
    return StrategySpec(name=name, target=f"faulty_parts:{target}", summary=summary, **fields)

@hookimpl
def torchweft_strategies():
    return [
        strategy("fine", presets=(Preset(alias="fine_2", options={"k": 2}, launcher="spawn"),)),
        strategy("demanding", "Demanding", presets=(Preset(alias="half", options={"k": 2}),)),
        strategy("absent", "Absent"),
        strategy("excused", "Absent", probe="faulty_probes:mute_but_hint"),
        strategy("unrelated", "Unrelated"),
        strategy("made", "Made"),
        strategy("silent", summary=""),
        strategy("talkative", summary="one line\\nand another"),
        strategy("wordy", summary="word " * 17),
        strategy("stopped", summary="it ends here."),
        strategy("second_ddp", aliases=("ddp",), devices=("cpu", "cuda")),
        strategy("twin_a", aliases=("twin",)),
        strategy("twin_b", aliases=("twin",)),
        strategy("echo", aliases=("echo",)),
        strategy("undocumented", "Undocumented"),
        strategy("untyped", "Untyped"),
        strategy("by_position", "ByPosition"),
        strategy("takes_all", "TakesAll"),
        strategy("busy", "Busy"),
        strategy("threaded", "Threaded"),
        strategy("waking", "Waking"),
        strategy("slip", presets=(Preset(alias="slip_1", options={"kk": 1}),)),
        strategy("mistyped", presets=(Preset(alias="mistyped_1", options={"k": "two"}),)),
        strategy("lost", presets=(Preset(alias="lost_1", launcher="spwan"),)),
        strategy("waking_preload", preload=("faulty_waking",)),
        strategy("absent_preload", preload=("faulty_absent",)),
    ]

@hookimpl
def torchweft_accelerators():
    return [AcceleratorSpec(name="half_done", target="faulty_parts:HalfDone", summary="no bind",
                            device="npu")]

@hookimpl
def torchweft_precisions():
    return [
        PrecisionSpec(name=name, target="faulty_parts:Number", summary="one of many",
                      probe=f"faulty_probes:{name}")
        for name in ("heavy", "true", "mute", "no_hint", "raising", "waking", "no", "exiting")
    ]

@hookimpl
def torchweft_launchers():
    return [
        LauncherSpec(name=name, target="faulty_parts:Start", summary="one of many",
                     detect=f"faulty_probes:{name}")
        for name in ("everywhere", "heavy_detect", "raising_detect")
    ]

@hookimpl
def torchweft_check_plan(plan):
    return (sentence for sentence in [])

@hookimpl
def torchweft_worker_context(run):
    return run
"""

FAULTY_PARTS = '''
import threading
from torchweft.api import Accelerator, Launcher, Precision, Strategy

class Fine(Strategy):
    """One that is right.

    Args:
        k: how many.
    """

    def __init__(self, *, k: int = 1) -> None: ...

class Demanding(Strategy):
    """Has the keywords of ``faulty_parts.Fine``, and its own.

    :param int more: how many more.
    """

    def __init__(self, more: int, k: int) -> None: ...

class Unrelated: ...

def make():
    class Inner(Strategy): ...
    return Inner

Made = make()

class Undocumented(Strategy):
    """Its text speaks of depth without an entry for it, and of ``faulty_parts.absent``.

    Args:
        width: in columns.
    """

    def __init__(self, *, width: int = 1, depth: int = 1) -> None: ...

class Untyped(Strategy):
    """Args:
        k: how many.
    """

    def __init__(self, *, k=1) -> None: ...

class ByPosition(Strategy):
    """Args:
        k: how many.
    """

    def __init__(self, k: int = 1, /, *more: int) -> None: ...

class TakesAll(Strategy):
    def __init__(self, **options: int) -> None: ...

class Busy(Strategy):
    def __init__(self) -> None:
        open(__file__).close()

class Threaded(Strategy):
    def __init__(self) -> None:
        threading.Thread(target=threading.Event().wait, daemon=True).start()

class Waking(Strategy):
    def __init__(self) -> None:
        import torch.distributed as dist
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

class HalfDone(Accelerator): ...

class Number(Precision): ...

class Start(Launcher):
    def launch(self, plan, function, arguments, *, fork_hazard=lambda: None): ...
'''

FAULTY_PROBES = """
import sys
from torchweft.specs import Availability, Detection

def mute_but_hint():
    return Availability(ok=False, reason="its library is not here", hint="pip install it")

no = mute_but_hint

def heavy():
    import torch
    return Availability(ok=True)

def true():
    return True

def mute():
    return Availability(ok=False)

def no_hint():
    return Availability(ok=False, reason="there is none")

def raising():
    raise OSError("no driver")

def exiting():
    import os
    os.write(1, b"last words")
    return sys.exit("no driver")

def waking():
    # As a driver does that is asked after torch was imported.
    if "torch" in sys.modules:
        sys.modules["torch"].xpu.is_initialized = lambda: True
    return Availability(ok=True)

def everywhere(environ):
    return None if environ else Detection(reason="it is everywhere")

def heavy_detect(environ):
    import numpy

def raising_detect(environ):
    return environ["CLUSTER"]
"""

#: Hooks that import torch, declare something else each time, of a distribution that is alone.
ODD_HOOKS = """
import torch
from torchweft.hookspecs import hookimpl
from torchweft.specs import PrecisionSpec
asked = []

@hookimpl
def torchweft_precisions():
    asked.append(1)
    return [PrecisionSpec(name="odd", target="odd_hooks:Odd")] * (len(asked) - 1)
"""

TESTS = """
from torchweft.testing import PluginConformance

class TestFaulty(PluginConformance):
    plugin = "faulty"

class TestOdd(PluginConformance):
    plugin = "odd"

class TestBroken(PluginConformance):
    plugin = "broken"

class TestTwice(PluginConformance):
    plugin = "twice"

class TestMisspelt(PluginConformance):
    plugin = "fautly"

class TestNameless(PluginConformance): ...
"""

#: Test, what it is about -> words of its failure. Everything else passes or is skipped.
FAILURES = {
    ("its_hook_answers_in_a_run", "torchweft_worker_context"): (
        r"torchweft_worker_context\(\) of torchweft-faulty 0\.1 returned <?.*Run.*, and not a "
        "context manager; torchweft"
    ),
    ("its_target_loads", "strategy-absent"): (
        r"strategy 'absent' \(torchweft-faulty 0\.1\): torchweft-faulty 0\.1 declares the target "
        r"'faulty_parts:Absent', which cannot be loaded: AttributeError: .*; write target= as"
    ),
    ("its_class_is_of_its_kind", "strategy-unrelated"): (
        r"the target 'faulty_parts:Unrelated' of strategy 'unrelated' \(torchweft-faulty 0\.1\) is "
        r"<class 'faulty_parts\.Unrelated'>, and not a subclass of torchweft\.api\.Strategy"
    ),
    ("its_class_is_of_its_kind", "accelerator-half_done"): (
        r"the class HalfDone of accelerator 'half_done' \(torchweft-faulty 0\.1\) does not define "
        r"bind, which torchweft\.api\.Accelerator leaves to it"
    ),
    ("its_class_can_be_pickled_by_name", "strategy-made"): (
        r"the class Inner of strategy 'made' \(.*\) cannot be pickled by its name: .*; define it"
    ),
    ("its_summary_is_one_line", "strategy-silent"): r"the summary '' of .* is empty; write one",
    ("its_summary_is_one_line", "strategy-talkative"): r" has several lines; write one line",
    ("its_summary_is_one_line", "strategy-wordy"): r" has 85 characters; write one line of at most",
    ("its_summary_is_one_line", "strategy-stopped"): r" ends with a full stop; write",
    ("its_names_are_nobody_else_s", "strategy-second_ddp"): (
        r"strategy 'second_ddp' \(torchweft-faulty 0\.1\) answers to 'ddp', and so does strategy "
        r"'ddp' \(torchweft-cuda .*\), for the same devices"
    ),
    ("its_names_are_nobody_else_s", "strategy-twin_a"): r"answers to 'twin', and so .* 'twin_b' ",
    ("its_names_are_nobody_else_s", "strategy-twin_b"): r"answers to 'twin', and so .* 'twin_a' ",
    ("its_names_are_nobody_else_s", "strategy-echo"): r"lists the name 'echo' twice; list it once",
    ("its_options_are_documented", "strategy-undocumented"): (
        r"the docstring of Undocumented \(strategy 'undocumented' .*\) says nothing about the "
        r"option 'depth'; add the line 'depth: …' under"
    ),
    ("its_options_are_typed", "strategy-untyped"): (
        r"the constructor of Untyped \(.*\) has no annotation for k; write one, such as k: "
    ),
    ("its_options_are_keywords", "strategy-by_position"): r"takes k, \*more by position alone, so",
    ("an_unknown_option_is_refused", "strategy-takes_all"): r"list its keywords in place of \*\*kw",
    ("constructing_it_does_nothing_else", "strategy-busy"): (
        r"constructing Busy \(strategy 'busy' .*\) did open\('.*faulty_parts\.py'\); a constructor"
    ),
    ("constructing_it_does_nothing_else", "strategy-threaded"): r" did it started a thread; a con",
    ("constructing_it_does_nothing_else", "strategy-waking"): (
        r"constructing Waking \(.*\) touched a device: afterwards torch\.distributed is initialised"
    ),
    ("a_preset_s_options_fit_the_constructor", "slip_1"): (
        r"the preset 'slip_1' of strategy 'slip' .* strategy 'slip_1' has no option 'kk'; did you "
        r"mean 'k'\? options of Fine: k"
    ),
    ("a_preset_s_options_fit_the_constructor", "mistyped_1"): r" takes k as int, not 'two'",
    ("a_preset_s_launcher_exists", "lost_1"): (
        r"needs launcher 'spwan', which nobody declares; did you mean 'spawn'\?"
    ),
    ("a_preloaded_module_imports_and_touches_no_device", "faulty_waking"): (
        r"importing 'faulty_waking', a preload of strategy 'waking_preload' .* touched a device: "
        r"afterwards torch\.mtia is initialised"
    ),
    ("a_preloaded_module_imports_and_touches_no_device", "faulty_absent"): (
        r"failed: ModuleNotFoundError: No module named 'faulty_absent'"
    ),
    ("its_probe_imports_no_torch", "faulty_probes:heavy"): (
        r"the probe 'faulty_probes:heavy' of precision 'heavy' \(torchweft-faulty 0\.1\) imports "
        r"torch \(.*faulty_probes\.py, line 11\), which takes seconds"
    ),
    ("its_probe_returns_an_availability", "faulty_probes:true"): (
        r" returned True, and not a torchweft\.specs\.Availability"
    ),
    ("its_probe_returns_an_availability", "faulty_probes:raising"): (
        r" raised OSError: no driver; it has to answer Availability\(ok=False, reason=…, hint=…\)"
    ),
    ("its_probe_returns_an_availability", "faulty_probes:exiting"): r" raised SystemExit: no dri",
    ("a_probe_that_says_no_says_why_and_what_to_do", "faulty_probes:mute"): (
        r" says no without a reason and a hint: Availability\(ok=False, .*; tell what is missing"
    ),
    ("a_probe_that_says_no_says_why_and_what_to_do", "faulty_probes:no_hint"): (
        r" says no without a hint: "
    ),
    ("its_probe_touches_no_device", "faulty_probes:waking"): (
        r"the probe 'faulty_probes:waking' of .* touched a device: afterwards torch\.xpu is initial"
    ),
    ("its_detection_finds_nothing_in_an_empty_environment", "faulty_probes:everywhere"): (
        r"the detection 'faulty_probes:everywhere' of launcher 'everywhere' .* returned Detection"
    ),
    ("its_detection_finds_nothing_in_an_empty_environment", "faulty_probes:raising_detect"): (
        r" raised KeyError: 'CLUSTER' for an empty environment"
    ),
    ("its_detection_imports_no_torch", "faulty_probes:heavy_detect"): r" imports numpy \(.*, line ",
}

#: The same of the other plugins: class and test.
OTHER_FAILURES = {
    ("TestOdd", "its_hooks_module_imports_without_torch"): (
        r"the hooks module of torchweft-odd 0\.1 imports torch \(.*odd_hooks\.py, line 2\), which"
    ),
    (
        "TestOdd",
        "it_declares_the_same_every_time",
    ): r"torchweft-odd 0\.1 declared\n  \(\)\nand, when it was asked again,\n  .*'odd'",
    ("TestOdd", "its_distribution_requires_torchweft"): (
        r'torchweft-odd 0\.1 requires numpy; add "torchweft>=0\.1,<0\.2" to dependencies'
    ),
    ("TestBroken", "it_loads"): (
        r"plugin 'broken' \(torchweft-broken 0\.1\) failed to load: ModuleNotFoundError: No module "
        r"named 'broken_comm'\n\nTraceback"
    ),
    ("TestTwice", "it_is_installed_once"): (
        r"torchweft-first 0\.1 and torchweft-second 0\.1 both call a plugin 'twice'; uninstall one"
    ),
    ("TestMisspelt", "it_is_installed_once"): (
        r"no plugin is called 'fautly'; did you mean 'faulty'\? installed: broken, builtin, .*; a "
        r"plugin is an entry point in the group 'torchweft'"
    ),
    ("TestNameless", "it_is_installed_once"): (
        r"TestNameless names no plugin; write plugin = 'NAME' in it"
    ),
}


def install(
    site: Path,
    plugin: str,
    *,
    distribution: str = "",
    requires: str = "torchweft>=0.1",
    **modules: str,
) -> None:
    """Write a distribution as an installer would."""
    for name, source in modules.items():
        (site / f"{plugin}_{name}.py").write_text(source)
    name = distribution or f"torchweft-{plugin}"
    info = site / f"{name.replace('-', '_')}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\nRequires-Dist: {requires}\n"
        'Requires-Dist: torchweft; extra == "never"\n'
    )
    (info / "entry_points.txt").write_text(f"[torchweft]\n{plugin} = {plugin}_hooks\n")


@dataclass
class Outcomes:
    """What became of the tests of a run: class, name and parameter -> words."""

    failed: dict[tuple[str, str, str], str]
    passed: set[tuple[str, str, str]]
    skipped: dict[tuple[str, str, str], str]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp("faulty")
    site = folder / "site"
    site.mkdir()
    install(
        site,
        "faulty",
        hooks=FAULTY_HOOKS,
        parts=FAULTY_PARTS,
        probes=FAULTY_PROBES,
        waking="import torch\ntorch.mtia.is_initialized = lambda: True\n",
    )
    install(site, "odd", hooks=ODD_HOOKS, requires="numpy")
    install(site, "broken", hooks="import broken_comm")
    install(site, "twice", hooks="", distribution="torchweft-first")
    install(site, "twice", hooks="", distribution="torchweft-second")
    (folder / "test_them.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "--junitxml=report.xml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return read(folder / "report.xml")


def read(report: Path) -> Outcomes:
    made = Outcomes({}, set(), {})
    for case in ElementTree.parse(report).iter("testcase"):
        name, _, parameter = case.attrib["name"].removesuffix("]").partition("[")
        key = case.attrib["classname"].rpartition(".")[2], name.removeprefix("test_"), parameter
        skipped, failure, error = (case.find(tag) for tag in ("skipped", "failure", "error"))
        assert error is None, error is not None and error.text
        if failure is not None:
            made.failed[key] = (failure.text or "").strip()
        elif skipped is not None:
            made.skipped[key] = skipped.attrib["message"]
        else:
            made.passed.add(key)
    return made


def test_each_fault_fails_the_test_that_is_meant_for_it_and_no_other(outcomes: Outcomes) -> None:
    expected = {("TestFaulty", *key) for key in FAILURES}
    expected |= {(*key, "") for key in OTHER_FAILURES}
    assert set(outcomes.failed) == expected


@pytest.mark.parametrize(("test", "about"), FAILURES)
def test_what_a_failure_says(outcomes: Outcomes, test: str, about: str) -> None:
    told = outcomes.failed["TestFaulty", test, about]
    assert re.search(FAILURES[test, about], told), told
    assert "/torchweft/testing/" not in told  # nothing of the kit's own stack


@pytest.mark.parametrize(("cls", "test"), OTHER_FAILURES)
def test_what_a_failure_of_a_whole_plugin_says(outcomes: Outcomes, cls: str, test: str) -> None:
    told = outcomes.failed[cls, test, ""]
    assert re.search(OTHER_FAILURES[cls, test], told), told


def test_what_is_right_passes_every_test_of_its_kind(outcomes: Outcomes) -> None:
    passed = {test for cls, test, about in outcomes.passed if (cls, about)[1] == "strategy-fine"}
    assert passed == {
        "its_summary_is_one_line",
        "its_names_are_nobody_else_s",
        "its_target_loads",
        "its_class_is_of_its_kind",
        "its_class_can_be_pickled_by_name",
        "importing_it_touches_no_device",
        "its_options_are_keywords",
        "its_options_are_typed",
        "its_options_are_documented",
        "an_unknown_option_is_refused",
        "constructing_it_does_nothing_else",
    }


def test_what_cannot_be_tried_is_skipped_with_its_reason(outcomes: Outcomes) -> None:
    def skipped(test: str, about: str = "", cls: str = "TestFaulty") -> str:
        return outcomes.skipped[cls, test, about]

    assert "its probe says that it cannot be used here: its library is not here" in skipped(
        "its_target_loads", "strategy-excused"
    )
    assert skipped("constructing_it_does_nothing_else", "strategy-demanding") == (
        "Demanding needs the option more, k"
    )
    assert skipped("it_declares_the_same_every_time", cls="TestBroken") == (
        "plugin 'broken' could not be loaded"
    )
    assert skipped("its_probe_imports_no_torch", "none", "TestBroken") == (
        "plugin 'broken' could not be loaded, or declares nothing"
    )
