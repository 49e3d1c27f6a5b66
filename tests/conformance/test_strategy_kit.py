"""The kit finds mistakes: strategies with one each fail the tests that are there for it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.timeout(300)

TRAINS = "test_it_trains_as_one_process_does"
WITH = "test_it_trains_with"

#: For each mutant, the tests that are there for its mistake, and words of what they say.
MISTAKES = {
    "Sums": ({TRAINS}, "the number of ranks: summed, and not averaged?"),
    "LeavesBuffers": (
        {"test_all_ranks_evaluate_as_the_checkpoint_does"},
        "parameters and buffers (running statistics too) are the same in every rank",
    ),
    "ClipsBefore": ({TRAINS}, "Strategy.clip comes after their reduction"),
    "SkipsTheLastBatch": ({WITH}, "samples=22"),
    "PrefixesNames": (
        {
            "test_a_checkpoint_has_the_names_of_the_model",
            "test_one_process_goes_on_from_its_checkpoint",
        },
        "see Strategy.module_state",
    ),
    "FeedsEverybodyAll": (
        {"test_every_process_feeds_replicas_of_its_own", "test_every_sample_is_seen"},
        "every replica is fed by one process",
    ),
    "ForgetsTheOptimizer": ({"test_it_goes_on_from_its_own_checkpoint"}, ".optimizer_state"),
    "ReducesOneMicroBatch": ({TRAINS}, "Strategy.backward, .accumulating"),
    "PassesBarriers": (
        {"test_a_barrier_holds", "test_all_reduce"},
        "passed a barrier before all had come",
    ),
    "DiffersFromTheBeginning": ({WITH}, "Strategy.setup gives every rank the parameters"),
    "Misspells": ({"test_no_member_is_misspelt"}, "did you mean 'accumulating'?"),
    "LetsPlainBackwardThrough": (
        {"test_a_plain_backward_is_right_or_refused"},
        "set owns_backward = True",
    ),
    "KeepsState": ({WITH}, "something of the models that were trained before it is left"),
}

#: All tests of which one finds a mistake. ``TORCHWEFT_SOAK=1``: nearly the whole kit.
_EVERY = sorted(set().union(*(tests for tests, _ in MISTAKES.values())))
FULL = os.environ.get("TORCHWEFT_SOAK") == "1"


@dataclass
class Report:
    """What pytest says of one class: the names of tests, without parameters, and its words."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    words: str = ""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Report]:
    """By the name of the strategy's class."""
    folder = tmp_path_factory.mktemp("kit")
    file, told = folder / "test_mutants.py", folder / "told.xml"
    lines = ["from tests.conformance import mutants"]
    lines += ["from torchweft.testing import StrategyConformance", ""]
    for name in ("Right", *MISTAKES):
        lines += [f"class Test{name}(StrategyConformance):", f"    strategy = mutants.{name}()"]
        lines += ["    devices = (2,)", "    timeout = 20.0"]
    file.write_text("\n".join(lines) + "\n")
    root = Path(__file__).parents[2]
    settings = ["--rootdir", root, "-c", root / "pyproject.toml", "-p", "no:cacheprovider"]
    # Of most mutants what is there for their mistake; of two everything that trains. Ranks that
    # fail or hang are alike in all of them.
    wanted = [f"(Test{name} and ({' or '.join(tests)}))" for name, (tests, _) in MISTAKES.items()]
    right = "not (collective_is or waiting or ends_the_run)" if FULL else " or ".join(_EVERY)
    wanted += [f"(TestRight and ({right}))"]
    wanted += ["(TestClipsBefore and trains)", "(TestLeavesBuffers and trains)"]
    chosen = ["-k", " or ".join(wanted)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", file, f"--junitxml={told}", *settings, *chosen],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[str, Report] = {}
    for case in ElementTree.parse(told).iter("testcase"):
        report = found.setdefault(case.attrib["classname"].rpartition(".Test")[2], Report())
        name = case.attrib["name"].partition("[")[0]
        failures = [*case.iter("failure"), *case.iter("error")]
        if failures:
            report.failed.append(name)
            report.words += " ".join((failures[0].text or "").replace("\nE ", "\n").split())
        elif case.find("skipped") is None:
            report.passed.append(name)
    return found


def test_a_strategy_that_is_right_passes(reports):
    assert reports["Right"].failed == [], reports["Right"].words
    assert len(reports["Right"].passed) > (100 if FULL else 25)


@pytest.mark.parametrize("mutant", MISTAKES)
def test_a_mistake_is_found(reports, mutant):
    tests, words = MISTAKES[mutant]
    assert tests <= set(reports[mutant].failed), reports[mutant].words
    assert words in reports[mutant].words


@pytest.mark.parametrize("mutant", ["ClipsBefore", "LeavesBuffers"])
def test_what_is_right_about_it_passes(reports, mutant):
    """A report in which everything is red helps nobody to find the mistake."""
    assert len(reports[mutant].failed) < 18, reports[mutant].words
    assert len(reports[mutant].passed) > 15
