"""Every example runs on two processes and does what its page says, with warnings as errors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import torch

from tests.endtoend.commands import Result
from torchweft.cli.run import run as torchweft_run

EXAMPLES = Path(__file__).parents[2] / "examples"

PYTHON = "python"
COMMAND = "torchweft run"


@pytest.fixture
def example(run: Callable[..., Result], tmp_path: Path) -> Callable[..., list[str]]:
    """Run an example's script on CPU processes, one way or the other; returns its lines."""

    def lines(way: str, script: str, *flags: str, devices: str = "2") -> list[str]:
        path = str(EXAMPLES / script)
        there = ["--accelerator", "cpu", "--devices", devices]
        commands = {
            PYTHON: [sys.executable, path, *there],
            COMMAND: [sys.executable, "-m", "torchweft", "run", *there, path],
        }
        environ = {"PYTHONWARNINGS": "error", "CUDA_VISIBLE_DEVICES": ""}
        done = run(*commands[way], *flags, environ=environ, cwd=tmp_path)
        assert done.status == 0, done.out + done.err
        assert done.err == ""
        return done.lines

    return lines


def numbers(pattern: str, lines: list[str]) -> list[float]:
    """The number in each line that holds the pattern, whose one group it is."""
    return [float(match[1]) for line in lines if (match := re.search(pattern, line))]


def test_cross_validation(example):
    lines = example(PYTHON, "kfold/train.py", "--folds", "3", "--epochs", "10")
    folds = [re.fullmatch(r"fold (\d)/3  loss \d\.\d{4}  accuracy (\d\.\d{4})", x) for x in lines]
    scores = [float(match[2]) for match in folds if match]
    assert [match[1] for match in folds if match] == ["1", "2", "3"]
    assert min(scores) > 0.9
    (mean,) = numbers(r"^accuracy (\d\.\d{4}) ± \d\.\d{4}$", lines)
    assert mean == pytest.approx(sum(scores) / 3, abs=1e-4)


def test_two_models_come_nearer_to_the_data_and_go_on_from_a_checkpoint(example, tmp_path):
    flags = ["--checkpoint", "both.ckpt", "--epochs"]
    lines = example(COMMAND, "gan/train.py", *flags, "10")
    before, after = numbers(r"^distance to the real images (\d+\.\d+)$", lines)
    assert after < before / 2
    # Five digits are drawn, eight lines high.
    assert [len(line) for line in lines[-8:]] == [5 * 16 + 4 * 2] * 8
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)
    assert {"generator", "discriminator", "optimizer_g", "optimizer_d"} < set(saved)

    lines = example(PYTHON, "gan/train.py", *flags, "20", "--resume")
    assert lines[0] == "resumed after epoch 10"
    assert numbers(r"^epoch +(\d+)/20", lines) == [15, 20]
    resumed, end = numbers(r"^distance to the real images (\d+\.\d+)$", lines)
    # Other noise is drawn, so that the distance is not the same to the last digit.
    assert resumed == pytest.approx(after, rel=0.1)
    assert end < after


@pytest.mark.parametrize(("way", "precision"), [(PYTHON, "32-true"), (COMMAND, "bf16-mixed")])
def test_a_language_model_learns_and_writes(example, way, precision):
    small = ["--steps", "40", "--width", "64", "--depth", "2", "--sample", "50"]
    lines = example(way, "language_model/train.py", *small, "--precision", precision)
    losses = numbers(r"^step +\d+/40  loss (\d+\.\d{4})  gradient norm \d+\.\d\d$", lines)
    assert len(losses) == 3
    # At the start all 128 characters are as likely; ln(128) is 4.85.
    assert losses[0] == pytest.approx(4.85, abs=0.2)
    assert losses[-1] < losses[0] - 1.5
    (validation,) = numbers(r"^validation loss (\d+\.\d{4})$", lines)
    assert validation == pytest.approx(losses[-1], abs=0.5)
    written = "\n".join(lines).partition("validation loss")[2].partition("\n")[2]
    assert written.startswith("def ")


SHARDED = "sharded_language_model/train.py"
SMALL = ["--steps", "6", "--width", "32", "--depth", "2", "--context", "32", "--batch-size", "16"]
EVERY = ["--log-every", "1", "--save-every", "3", "--lr", "1e-2", "--warmup", "1"]
STEPS = r"^step +\d+/6  loss (\d+\.\d{4})  gradient norm \d+\.\d{4}$"
HELD = r"of which a process holds ([\d,]+);"


@pytest.fixture(scope="module")
def losses_of_one() -> Callable[[Callable[..., list[str]]], list[float]]:
    """The losses of one process, which runs once."""
    known: list[float] = []

    def losses(example: Callable[..., list[str]]) -> list[float]:
        if not known:
            known.extend(numbers(STEPS, example(PYTHON, SHARDED, *SMALL, *EVERY, devices="1")))
        return known

    return losses


@pytest.mark.parametrize(
    ("way", "devices", "strategy", "held"),
    [
        (COMMAND, "2", "fsdp:policy=Block", 1 / 2),
        (PYTHON, "2", "fsdp:tensor=2", 0.525),
        (COMMAND, "4", "fsdp:policy=Block,tensor=2", 0.525 / 2),
    ],
)
def test_a_model_that_is_split_learns_what_one_process_does(
    example, losses_of_one, way, devices, strategy, held
):
    flags = [*SMALL, *EVERY, "--strategy", strategy, "--folder", "saved"]
    lines = example(way, SHARDED, *flags, devices=devices)
    losses, expected = numbers(STEPS, lines), losses_of_one(example)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.2
    # What is printed, of which rounding may change the last digit.
    assert losses == pytest.approx(expected, abs=1.5e-4)
    assert float(re.search(HELD, lines[0])[1].replace(",", "")) == pytest.approx(
        30592 * held, rel=1e-2
    )

    # One process goes on from the parts that all of them wrote.
    resume = ["--resume", "saved/step3"]
    lines = example(PYTHON, SHARDED, *SMALL, *EVERY, *resume, devices="1")
    assert lines[1] == "going on after step 3"
    assert numbers(STEPS, lines) == pytest.approx(expected[3:], abs=1.5e-4)


def test_a_sequence_is_divided_between_layers(example, losses_of_one):
    flags = ["--strategy", "fsdp:tensor=2", "--sequence-parallel"]
    losses = numbers(STEPS, example(COMMAND, SHARDED, *SMALL, *EVERY, *flags))
    assert losses == pytest.approx(losses_of_one(example), abs=1.5e-4)


def test_an_agent_learns_to_balance(example):
    lines = example(COMMAND, "reinforcement_learning/train.py", "--updates", "25")
    returns = numbers(r"^update +\d+/25  episodes +\d+  mean return (\d+\.\d)$", lines)
    assert len(returns) == 5
    assert returns[0] < 60
    assert returns[-1] > 100
    # Two processes with four environments each played 128 steps in each of 25 updates; what was
    # going on when a report was made counts in the next, and in none at the end.
    episodes = numbers(r"episodes +(\d+)", lines)
    played = sum(count * mean for count, mean in zip(episodes, returns, strict=True))
    assert 2 * 4 * (25 * 128 - 500) < played <= 2 * 4 * 25 * 128


def test_a_trainer_goes_on_as_if_it_had_not_been_interrupted(example, tmp_path):
    whole = example(PYTHON, "trainer/train.py", "--folder", "whole", "--epochs", "4")
    epochs = [line for line in whole if line.startswith("epoch")]
    assert len(epochs) == 4
    (accuracy,) = numbers(r"^test accuracy (\d\.\d{4}), with the model of epoch \d$", whole)
    assert accuracy > 0.9

    first = example(COMMAND, "trainer/train.py", "--folder", "parts", "--epochs", "2")
    assert [line for line in first if line.startswith("epoch")] == epochs[:2]
    second = example(PYTHON, "trainer/train.py", "--folder", "parts", "--epochs", "4", "--resume")
    assert second == ["going on after epoch 2, step 40", *epochs[2:], whole[-1]]

    def logged(folder: str) -> list[dict[str, float]]:
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    assert logged("parts") == logged("whole")
    assert [line["step"] for line in logged("whole") if "train/loss" in line] == [
        *range(10, 81, 10)
    ]
    callbacks = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["callbacks"]
    best = max(line.get("validation/accuracy", 0) for line in logged("whole"))
    assert callbacks["KeepBest"] == {"best": best}


def test_a_callback_ends_the_training(example):
    lines = example(PYTHON, "trainer/train.py", "--epochs", "50", "--patience", "1")
    assert lines[-2] == "no better loss for 1 epochs"
    done = sum(line.startswith("epoch") for line in lines)
    losses = numbers(r"loss (\d\.\d{4})", lines)
    assert done < 50
    assert losses[-1] >= losses[-2] - 1e-4
    assert losses[:-1] == sorted(losses[:-1], reverse=True)


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What the cells of a notebook wrote to standard output, as lines."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(out.text for out in outputs if out.get("name") == "stdout").splitlines()


def test_a_notebook_trains_on_two_processes(run, tmp_path):
    notebook, executed = EXAMPLES / "notebook" / "train.ipynb", tmp_path / "executed.ipynb"
    # nbclient is run as the page says; a process of its own shows what it would leave behind.
    command = [sys.executable, "-m", "jupyter", "execute", str(notebook), "--output", str(executed)]
    done = run(*command, environ={"CUDA_VISIBLE_DEVICES": "", "IPYTHONDIR": str(tmp_path)})
    assert done.status == 0, done.out + done.err
    lines = printed(nbformat.read(executed, as_version=4))
    assert [x.split()[:2] for x in lines if x.startswith("processes")] == [["processes", "2"]]
    losses = numbers(r"^epoch +\d+/10  loss (\d\.\d{4})$", lines)
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 10
    assert "\0" not in "".join(lines)
    (accuracy,) = numbers(r"^test accuracy (\d\.\d{4})$", lines)
    assert accuracy > 0.9
    # A second launch in the same notebook.
    assert len(numbers(r"^epoch +\d+/3  loss (\d\.\d{4})$", lines)) == 3


PAGES = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md"))


def test_every_example_has_a_page_and_is_in_the_index():
    folders = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
    assert folders == PAGES
    index = (EXAMPLES / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[(\w+)\]\(\1/\) \|", index, re.MULTILINE)) == folders


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_a_command_that_there_is(name):
    page = (EXAMPLES / name / "README.md").read_text()
    named = set(re.findall(r"examples/(\S+\.(?:py|ipynb))", page))
    assert named
    assert all((EXAMPLES / path).is_file() for path in named)
    for script in (path for path in named if path.endswith(".py")):
        source = (EXAMPLES / script).read_text()
        flags = set(re.findall(r"(?<=[ `])--[a-z-]+", page))
        of_the_command = {flag for parameter in torchweft_run.params for flag in parameter.opts}
        assert not {flag for flag in flags if f'"{flag}"' not in source} - of_the_command
