"""``torchweft slurm``: the script that it prints. Submitted to a real SLURM in tests/slurm."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft.cli import main
from torchweft.cli.batch_script import BatchScript
from torchweft.errors import InvalidRequest


@pytest.fixture(autouse=True)
def _script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "my train.py").write_text("")
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        main(["slurm", *words])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    lines: list[str] = out.splitlines()
    # What bash can read.
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)
    return lines


def refused(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["slurm", *words])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (status, "")
    return str(err)


def test_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "train.py") == [
        "#!/bin/bash",
        "#SBATCH --job-name=train",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "",
        f"srun --kill-on-bad-exit=1 {sys.executable} train.py",
    ]


def test_everything(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--nodes=2", "--devices=4", "--gpus-per-node=a100:4", "--cpus-per-task=6"]
    flags += ["--time=1-12:00:00", "--partition=gpu", "--account=us", "--job-name=two words #1"]
    flags += ["--output=out/%j.txt", "--signal=USR1@90", "--requeue"]
    flags += ["--sbatch-option=constraint=a|b", "--sbatch-option=--exclusive"]
    flags += ["--accelerator=cuda", "--precision=bf16-mixed", "--strategy=ddp:static_graph=true"]
    words = ["my train.py", "--lr", "0.1", "--", "--time", "it's"]
    step = ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=6", sys.executable, "-m", "torchweft"]
    step += ["run", "--accelerator=cuda", "--strategy=ddp:static_graph=true"]
    step += ["--precision=bf16-mixed", "my train.py", "--", "--lr", "0.1", "--time", "it's"]
    assert printed(capsys, *flags, *words) == [
        "#!/bin/bash",
        '#SBATCH --job-name="two words #1"',
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --gpus-per-node=a100:4",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=us",
        "#SBATCH --output=out/%j.txt",
        "#SBATCH --signal=USR1@90",
        "#SBATCH --requeue",
        '#SBATCH --constraint="a|b"',
        "#SBATCH --exclusive",
        "",
        shlex.join(step),
    ]


def test_a_signal_for_the_batch_script_is_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "train.py", "--signal", "B:USR1@90")
    assert "#SBATCH --signal=B:USR1@90" in lines
    assert lines[-7:] == [
        f"srun --kill-on-bad-exit=1 {sys.executable} train.py &",
        "step=$!",
        "trap 'kill -s USR1 \"$step\"' USR1",
        'until wait "$step"; do',
        "  status=$?",
        '  kill -0 "$step" 2> /dev/null || exit "$status"',
        "done",
    ]


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8)))
def test_every_argument_arrives_as_it_is(arguments: list[str]) -> None:
    text = BatchScript(options={}, command=["train.py", *arguments]).text()
    head, _, step = text.partition("\n\n")
    assert head == "#!/bin/bash"
    assert shlex.split(step) == ["srun", "--kill-on-bad-exit=1", "train.py", *arguments]


@pytest.mark.parametrize("name", ["two\nlines", "a\tb", "\x1b[31m"])
def test_what_does_not_fit_on_a_line(name: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        BatchScript(options={"job-name": name}, command=["a"]).text()
    assert str(raised.value) == (
        f"--job-name is {name!r}, which does not fit on the line of a batch script; leave out what "
        "is no printable character"
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["--signal", "USR1@soon", "train.py"],
            (
                "--signal USR1@soon is not understood; it takes the name of a signal and the "
                "seconds before the end at which it is sent, such as USR1@90, or B:USR1@90 for the "
                "batch script, which hands it on"
            ),
        ),
        (
            ["--sbatch-option", "nodes=2", "train.py"],
            "--sbatch-option nodes=2 says what --nodes says; write --nodes 2",
        ),
        (
            ["--sbatch-option", "requeue", "train.py"],
            "--sbatch-option requeue says what --requeue says; write --requeue",
        ),
        (
            ["--sbatch-option", "ntasks-per-node=2", "train.py"],
            ("--sbatch-option ntasks-per-node=2 says what --devices says; write --devices 2"),
        ),
        (
            ["--sbatch-option", "qos=a", "--sbatch-option", "qos=b", "train.py"],
            "--sbatch-option gives 'qos' twice, 'a' and 'b'; leave one of them out",
        ),
        (
            ["--sbatch-option", "=3", "train.py"],
            (
                "--sbatch-option =3 is not understood; it takes the long name of an option of "
                "sbatch with its value, such as constraint=a100, or the name alone, such as "
                "exclusive"
            ),
        ),
        (
            ["--partitoin", "gpu", "train.py"],
            (
                "'torchweft slurm' has no option --partitoin; did you mean '--partition'?; what "
                "is meant for the script stands behind its path"
            ),
        ),
    ],
)
def test_what_is_refused(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *words) == f"error: {error}\n"


def test_names_and_scripts_that_are_wrong_are_told_before_the_queue(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refused(capsys, "--strategy", "ddp:static", "train.py").startswith(
        "error: strategy='ddp:static' has 'static' where an option belongs"
    )
    assert refused(capsys, "trian.py").startswith("error: script 'trian.py' does not exist")
    # What clusters without this GPU's package cannot know is left to the ranks.
    assert printed(capsys, "--strategy", "theirs", "train.py")[-1].endswith(
        "run --strategy=theirs train.py --"
    )


def test_where_sbatch_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(capsys, "--submit", "train.py", status=1) == (
        "error: --submit needs sbatch, which is not installed here (it is not in PATH); run this "
        "on a login node of the cluster, or leave --submit out, and the script is printed\n"
    )


def test_names_that_nobody_has(capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "--strategy", "dpp", "train.py")
    assert err.startswith("error: no strategy is called 'dpp' (--strategy); did you mean 'ddp'? ")
    assert "no accelerator is called 'cdua'" in refused(capsys, "--accelerator=cdua", "train.py")
    # What is known and is not here may be there, where the job runs.
    assert "--strategy=xla_fsdp" in printed(capsys, "--strategy", "xla_fsdp", "train.py")[-1]


def test_a_module(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert "a module is run with -m package.train" in refused(capsys, "package.train")
    assert "no module is called 'package.train' (-m)" in refused(capsys, "-m", "package.train")
    Path("package").mkdir()
    Path("package", "train.py").write_text("")
    lines = printed(capsys, "-m", "package.train", "--lr", "0.1")
    assert lines[1] == "#SBATCH --job-name=package.train"
    assert lines[-1] == f"srun --kill-on-bad-exit=1 {sys.executable} -m package.train --lr 0.1"
    lines = printed(capsys, "--strategy", "ddp", "-m", "package.train", "--lr", "0.1")
    assert lines[-1].endswith(
        f"{sys.executable} -m torchweft run --strategy=ddp -m package.train -- --lr 0.1"
    )
