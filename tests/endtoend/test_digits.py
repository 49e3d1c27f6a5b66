"""The example: the two scripts differ by the promised lines, and both learn to read digits."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"

# The conversion that the documentation promises, and beside it what a script that prints needs:
# one line saying what runs, a loss averaged over processes, and printing by one process alone.
REMOVED = [
    'device = torch.device("cuda" if torch.cuda.is_available() else "cpu")',
    "model = model.to(device)",
    "input, target = input.to(device), target.to(device)",
    "loss.backward()",
    r'print(f"epoch {epoch:2}/{epochs}  step {step:2}/{len(dataloader)}", end="\r")',
    "mean = total / len(dataloader)",
    'print(f"epoch {epoch:2}/{epochs}  loss {mean:.4f}")',
    "input, target = input.to(device), target.to(device)",
    'print(f"test accuracy {correct / len(test):.4f}")',
]
ADDED = [
    "from torchweft import Fabric",
    "fabric = Fabric()",
    "fabric.launch()",
    "fabric.print(fabric.plan.explain())",
    "model, optimizer = fabric.setup(model, optimizer)",
    "dataloader = fabric.setup_dataloaders(dataloader)",
    "test_dataloader = fabric.setup_dataloaders(test_dataloader, use_distributed_sampler=False)",
    "fabric.backward(loss)",
    r'fabric.print(f"epoch {epoch:2}/{epochs}  step {step:2}/{len(dataloader)}", end="\r")',
    "mean = fabric.all_reduce(total / len(dataloader))",
    'fabric.print(f"epoch {epoch:2}/{epochs}  loss {mean:.4f}")',
    'fabric.print(f"test accuracy {correct / len(test):.4f}")',
]


def test_the_converted_script_differs_by_the_promised_lines_alone():
    plain = (EXAMPLE / "train_torch.py").read_text().splitlines()
    converted = (EXAMPLE / "train.py").read_text().splitlines()
    lines = list(difflib.ndiff(plain, converted))
    assert [line[2:].strip() for line in lines if line.startswith("- ")] == REMOVED
    added = [line[2:].strip() for line in lines if line.startswith("+ ")]
    assert [line for line in added if line] == ADDED


RUN = ["-m", "torchweft", "run", "--accelerator", "cpu"]


def run(*command: str) -> list[str]:
    """What the command printed, after it ended in order, as lines."""
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=100,
        env=environ,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def epochs_and_accuracy(lines: list[str]) -> tuple[list[tuple[int, float]], float]:
    """``(epoch, loss)`` of every line that tells one, and the accuracy told once at the end."""
    epochs = [re.fullmatch(r"epoch +(\d+)/\d+  loss (\d+\.\d{4})", line) for line in lines]
    accuracies = [re.fullmatch(r"test accuracy (\d\.\d{4})", line) for line in lines]
    (accuracy,) = [float(match[1]) for match in accuracies if match]
    return [(int(match[1]), float(match[2])) for match in epochs if match], accuracy


def test_the_page_shows_the_difference_that_there_is():
    shown = (EXAMPLE / "README.md").read_text().split("```diff\n")[1].split("```")[0].splitlines()
    assert [line[1:].strip() for line in shown[2:] if line.startswith("-")] == REMOVED
    added = [line[1:].strip() for line in shown[2:] if line.startswith("+")]
    assert [line for line in added if line] == ADDED


def test_the_plain_script_learns():
    epochs, accuracy = epochs_and_accuracy(run(str(EXAMPLE / "train_torch.py")))
    assert [epoch for epoch, _ in epochs] == list(range(1, 16))
    assert accuracy >= 0.97


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        pytest.param([], 1, id="python"),
        pytest.param([*RUN, "--devices", "2", "--strategy", "ddp"], 2, id="run-2"),
    ],
)
def test_the_converted_script_learns(command, processes):
    lines = run(*command, str(EXAMPLE / "train.py"))
    # The plan comes first and says how many processes there are.
    plan = lines[: next(i for i, line in enumerate(lines) if line.startswith("epoch"))]
    assert [line.split()[:2] for line in plan if line.startswith("processes")] == [
        ["processes", str(processes)]
    ]
    # One process speaks: every epoch is told once.
    epochs, accuracy = epochs_and_accuracy(lines)
    assert [epoch for epoch, _ in epochs] == list(range(1, 16))
    assert epochs[-1][1] < epochs[0][1] / 5
    assert accuracy >= 0.97
