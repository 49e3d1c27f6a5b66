"""``torchweft new``: what it writes, which names it takes, and what it refuses."""

from __future__ import annotations

import ast
import importlib.util
import keyword
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import torchweft
from torchweft.cli import new as module
from torchweft.cli.new import new
from torchweft.errors import InvalidRequest, TorchweftError
from torchweft.faults import faults
from torchweft.known import KNOWN
from torchweft.specs import KINDS, AcceleratorSpec, LauncherSpec, PrecisionSpec, StrategySpec

ROOT = Path(__file__).parents[2]

SPECS = {
    "accelerator": AcceleratorSpec,
    "strategy": StrategySpec,
    "precision": PrecisionSpec,
    "launcher": LauncherSpec,
}

#: What every package has, and what one of a kind has beside.
COMMON = {
    ".github/workflows/test.yml",
    ".gitignore",
    "CHANGELOG.md",
    "README.md",
    "pyproject.toml",
    "tests/test_far_loom.py",
    "torchweft_far_loom/__init__.py",
    "torchweft_far_loom/hooks.py",
    "torchweft_far_loom/py.typed",
}
OWN = {
    "accelerator": {"accelerator.py", "probe.py"},
    "strategy": {"strategy.py"},
    "precision": {"precision.py"},
    "launcher": {"launcher.py", "detect.py", "start.py"},
}


def invoke(*arguments: str | Path) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(new, [str(argument) for argument in arguments])
    if isinstance(result.exception, TorchweftError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def write(folder: Path, kind: str, name: str = "far-loom", *arguments: str) -> Path:
    invoke(kind, name, "--into", folder, *arguments)
    (made,) = folder.iterdir()
    return made


def contents(package: Path) -> dict[str, str]:
    files = [path for path in package.rglob("*") if path.is_file()]
    return {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in files}


def project(package: Path) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    loaded: dict[str, Any] = tomllib.loads((package / "pyproject.toml").read_text("utf-8"))
    return loaded["project"]


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_complete_and_nothing_is_left_open(kind: str, tmp_path: Path) -> None:
    package = write(tmp_path, kind)
    assert package.name == "torchweft-far-loom"
    texts = contents(package)
    assert set(texts) == COMMON | {f"torchweft_far_loom/{file}" for file in OWN[kind]}
    for name, text in texts.items():
        # "$ pip" is a prompt, and "${{" the workflow's own.
        assert not re.search(r"\$(?! |\{\{)", text), name
        assert text.endswith("\n") or name.endswith("py.typed")
        assert not text.endswith("\n\n")


def test_every_template_is_used(tmp_path: Path) -> None:
    folder = ROOT / "core" / "torchweft" / "cli" / "templates"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    used = {
        f"{source.replace('$kind', kind)}.template" for source in module._COMMON for kind in KINDS
    }
    used |= {f"{kind}/{file}.template" for kind, files in module._FURTHER.items() for file in files}
    assert there == used


def hooks_of(package: Path) -> Any:
    (path,) = package.glob("torchweft_*/hooks.py")
    spec = importlib.util.spec_from_file_location("hooks_that_were_written", path)
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


@pytest.mark.parametrize("kind", KINDS)
def test_the_hooks_declare_the_name(kind: str, tmp_path: Path) -> None:
    package = write(tmp_path, kind)
    hook = "torchweft_strategies" if kind == "strategy" else f"torchweft_{kind}s"
    (spec,) = getattr(hooks_of(package), hook)()
    assert isinstance(spec, SPECS[kind])
    assert spec.name == "far-loom"
    assert spec.target == f"torchweft_far_loom.{kind}:FarLoom{kind.capitalize()}"
    # Never chosen by "auto" without its author's doing.
    assert spec.priority is None
    assert faults(spec) == []
    for target in spec.targets().values():
        name, _, attribute = target.partition(":")
        tree = ast.parse((package / name.replace(".", "/")).with_suffix(".py").read_text())
        assert attribute in {getattr(node, "name", "") for node in tree.body}


def test_the_metadata(tmp_path: Path) -> None:
    found = project(write(tmp_path, "strategy"))
    assert found["name"] == "torchweft-far-loom"
    assert found["requires-python"] == ">=3.10"
    assert found["entry-points"] == {"torchweft": {"far-loom": "torchweft_far_loom.hooks"}}
    needs = {r.name: r for r in map(Requirement, found["dependencies"])}
    assert set(needs) == {"torch", "torchweft"}
    major, minor = map(int, torchweft.__version__.split(".")[:2])
    assert str(needs["torchweft"].specifier) == f"<{major}.{minor + 1},>={major}.{minor}"
    assert torchweft.__version__ in needs["torchweft"].specifier
    assert str(needs["torch"].specifier) == ">=2.9"
    tests = {r.name: r for r in map(Requirement, found["optional-dependencies"]["test"])}
    assert set(tests) == {"pytest", "torchweft"}
    assert tests["torchweft"].extras == {"testing"}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.1.0", ">=0.1,<0.2"),
        ("1.12.3", ">=1.12,<1.13"),
        ("0.2.0rc1", ">=0.2.0rc1,<0.3"),
        ("0.2.0.dev3", ">=0.2.0.dev3,<0.3"),
    ],
)
def test_the_versions_of_torchweft_that_it_goes_with(version: str, expected: str) -> None:
    assert module._range(version) == expected
    assert Requirement(f"torchweft{expected}").specifier.contains(version, prereleases=True)


@pytest.mark.parametrize(
    ("author", "expected"),
    [
        ("Ada Lovelace", {"name": "Ada Lovelace"}),
        ("Ada Lovelace <ada@example.org>", {"name": "Ada Lovelace", "email": "ada@example.org"}),
        ("Zoë 'Z' \\ \"$kind\"", {"name": "Zoë 'Z' \\ \"$kind\""}),
        (None, {"name": "The torchweft-far-loom authors"}),
    ],
)
def test_the_author(author: str | None, expected: dict[str, str], tmp_path: Path) -> None:
    given = [] if author is None else ["--author", author]
    package = write(tmp_path, "precision", "far-loom", *given)
    assert project(package)["authors"] == [expected]


@given(st.text(min_size=1, max_size=20))
@example('"')
@example("\x7f")
@example("Ada <ada>")
def test_any_author_is_kept_or_refused(author: str) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    try:
        text = module._author(author)
    except InvalidRequest:
        assert not author.isprintable() or not author.strip()
        return
    (person,) = tomllib.loads(f"a = [{text}]")["a"]
    if "email" in person:
        assert re.sub(r"\s", "", author) == re.sub(r"\s", "", "{name}<{email}>".format(**person))
    else:
        assert person == {"name": author.strip()}


def test_the_workflow_tests_the_oldest_and_a_new_python(tmp_path: Path) -> None:
    path = write(tmp_path, "strategy") / ".github" / "workflows" / "test.yml"
    workflow = yaml.safe_load(path.read_text("utf-8"))
    # YAML 1.1 takes the key "on" for a boolean.
    assert set(workflow[True]) == {"push", "pull_request"}
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"] == {"python": ["3.10", "3.13"]}
    setup = next(step for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert setup["with"]["python-version"] == "${{ matrix.python }}"
    assert [step["run"] for step in job["steps"] if "run" in step] == [
        'pip install ".[test]"',
        "pytest",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_readme_says_how_to_install_use_and_test(kind: str, tmp_path: Path) -> None:
    text = contents(write(tmp_path, kind))["README.md"]
    assert text.startswith("# torchweft-far-loom\n")
    for part in (
        "pip install torchweft-far-loom",
        "far-loom",
        'pip install -e ".[test]"',
        "LICENSE",
    ):
        assert part in text
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings == ["Install", "Use", "Test", "Where to go on"]


def test_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("strategy", "far-loom") == textwrap.dedent(
        f"""\
        wrote torchweft-far-loom{os.sep}
          .github/workflows/test.yml
          .gitignore
          CHANGELOG.md
          README.md
          pyproject.toml
          tests/test_far_loom.py
          torchweft_far_loom/__init__.py
          torchweft_far_loom/hooks.py
          torchweft_far_loom/py.typed
          torchweft_far_loom/strategy.py

        It has no licence yet: add a file LICENSE, and its name in pyproject.toml.

        To go on:
          pip install -e 'torchweft-far-loom[test]'
          pytest torchweft-far-loom
          torchweft plan --strategy far-loom --accelerator cpu --devices 2
        """
    )


def test_an_empty_folder_and_one_that_is_missing_are_used(tmp_path: Path) -> None:
    place = tmp_path / "a b" / "c"
    (place / "torchweft-far-loom").mkdir(parents=True)
    shown = invoke("launcher", "far-loom", "--into", place)
    assert f"pip install -e '{place}/torchweft-far-loom[test]'" in shown
    assert f"pytest '{place}/torchweft-far-loom'" in shown
    invoke("launcher", "near-loom", "--into", place / "d" / "e")
    assert (place / "d" / "e" / "torchweft-near-loom" / "README.md").is_file()


# -- code that is as it should be ------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A package of each kind, with the shortest and the longest names."""
    folder = tmp_path_factory.mktemp("written")
    names = ["{}", "{}" + "-word" * 4 + "-of2"]
    return [
        write(folder / name.format(letter), kind, name.format(letter))
        for letter, kind in zip("qxyz", KINDS, strict=True)
        for name in names
    ]


def test_summaries_fit_a_row_of_the_listing(written: list[Path]) -> None:
    for package in written:
        hooks = hooks_of(package)
        (spec,) = next(getattr(hooks, name)() for name in hooks.__all__)
        assert 0 < len(spec.summary) <= 80


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(written: list[Path], command: list[str]) -> None:
    for package in written:
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=package,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_the_rules_for_the_code_are_those_of_torchweft(tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    package = write(tmp_path, "strategy")
    mine, theirs = (
        tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["tool"]
        for folder in (ROOT, package)
    )
    assert theirs["ruff"]["line-length"] == mine["ruff"]["line-length"]
    assert theirs["ruff"]["lint"]["select"] == mine["ruff"]["lint"]["select"]
    assert theirs["mypy"]["strict"] is True
    assert theirs["pytest"]["ini_options"]["filterwarnings"] == ["error"]


def test_mypy_has_nothing_to_say(written: list[Path]) -> None:
    # With the cache of this project, in which torch is known already.
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    sources = [path for package in written for path in package.rglob("*.py")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *map(str, [*options, *sources])],
        cwd=written[0].parent,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, written))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"no issues found in {len(sources)} source files" in done.stdout


# -- names -----------------------------------------------------------------------------------------

NAMES = st.from_regex(module._NAME, fullmatch=True)


@given(NAMES | st.text(max_size=30), st.sampled_from(KINDS))
@example("a", "strategy")
@example("lambda", "launcher")
@example("strategy", "strategy")
def test_a_name_that_is_taken_can_be_all_that_it_has_to_be(name: str, kind: str) -> None:
    try:
        module._check_name(kind, name)
    except InvalidRequest:
        return
    words = module._words(kind, name, None)
    assert words["distribution"] == canonicalize_name(f"torchweft-{name}")
    assert len(words["distribution"]) <= 40
    for identifier in (words["module"], f"test_{words['word']}", words["prefix"], words["cls"]):
        assert identifier.isidentifier()
        assert not keyword.iskeyword(identifier)
    # Not one of the base classes' own names.
    assert words["cls"] != kind.capitalize()
    fields = {"device": "cpu"} if kind == "accelerator" else {}
    target = f"{words['module']}.{kind}:{words['cls']}"
    assert faults(SPECS[kind](name=name, target=target, **fields)) == []


@pytest.mark.parametrize("name", ["a", "sgd2", "local-sgd", "local_sgd", "a" * 25])
def test_names_that_are_taken(name: str) -> None:
    module._check_name("strategy", name)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("mean", "MeanStrategy"),
        ("local_sgd-2", "LocalSgd2Strategy"),
        ("mean-strategy", "MeanStrategy"),
        ("strategy", "StrategyStrategy"),
    ],
)
def test_the_class_is_named_after_it(name: str, cls: str) -> None:
    assert module._words("strategy", name, None)["cls"] == cls


def refused(*arguments: str | Path) -> str:
    with pytest.raises(InvalidRequest) as error:
        invoke(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("LocalSGD", "local-sgd"),
        ("Mean", "mean"),
        ("local sgd", "local-sgd"),
        ("local.sgd", "local-sgd"),
        ("2mean", "mean"),
        ("a--b", "a-b"),
        ("mean-", "mean"),
        ("_mean", "mean"),
        ("größe", "gr-e"),
        ("../mean", "mean"),
        ("42", ""),
        ("", ""),
    ],
)
def test_a_name_of_the_wrong_form(name: str, near: str, tmp_path: Path) -> None:
    expected = (
        f"'{name}' cannot be the name of a package: a name is of lower-case letters and digits, "
        "begins with a letter, and has single '-' or '_' between words"
    )
    expected += f"; try: torchweft new strategy {near}" if near else ""
    assert refused("strategy", name, "--into", tmp_path) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    name = "a" * 26
    expected = f"'{name}' has 26 characters; a name that users write has 25 at most"
    assert refused("strategy", name, "--into", tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "whose"),
    [("lambda", "of Python"), ("auto", "of torchweft, for leaving it open")],
)
def test_a_name_that_is_a_word_already(name: str, whose: str, tmp_path: Path) -> None:
    expected = f"'{name}' is a word {whose}; choose another name, such as '{name}-precision'"
    assert refused("precision", name, "--into", tmp_path) == expected


def test_a_name_with_the_prefix(tmp_path: Path) -> None:
    assert refused("strategy", "torchweft-mean", "--into", tmp_path) == (
        "'torchweft-mean' would make the package 'torchweft-torchweft-mean'; the prefix is added "
        "by itself, try: torchweft new strategy mean"
    )


# -- names that others have ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "declared"),
    [
        ("strategy", "ddp", "ddp"),
        ("strategy", "ddp_spawn", "ddp"),
        ("accelerator", "cpu", "cpu"),
        ("accelerator", "gpu", "(cuda|mps)"),
        ("precision", "bf16", "bf16-mixed"),
        ("launcher", "torchrun", "torchrun"),
    ],
)
def test_a_name_or_alias_that_is_declared(
    kind: str, name: str, declared: str, tmp_path: Path
) -> None:
    said = refused(kind, name, "--into", tmp_path)
    assert re.fullmatch(
        rf"{kind} '{name}' is there already: torchweft(-cuda)? [\w.]+ declares '{declared}'; "
        "choose another name",
        said,
    ), said


def test_a_name_is_free_for_another_kind(tmp_path: Path) -> None:
    write(tmp_path, "launcher", "ddp")


def test_a_name_that_is_well_known(tmp_path: Path) -> None:
    assert refused("strategy", "xla_fsdp", "--into", tmp_path) == (
        "strategy 'xla_fsdp' is in the package torchweft-xla, which would clash with yours where "
        "both are installed; choose another name"
    )


def test_the_name_of_a_plugin(tmp_path: Path) -> None:
    said = f"a plugin 'builtin' is installed already, from torchweft {torchweft.__version__}"
    assert refused("strategy", "builtin", "--into", tmp_path) == f"{said}; choose another name"
    assert refused("precision", "cuda", "--into", tmp_path).startswith(
        "a plugin 'cuda' is installed already, from torchweft-cuda "
    )


def test_the_name_of_a_package_that_is_not_installed(tmp_path: Path) -> None:
    assert "torchweft-xla" in KNOWN.values()
    assert refused("precision", "xla", "--into", tmp_path) == (
        "torchweft-xla is a package of the torchweft project; choose another name"
    )


@pytest.mark.parametrize("name", ["torchweft_far_loom.py", "torchweft_far_loom/__init__.py"])
def test_the_name_of_a_module(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "there" / name
    place.parent.mkdir(parents=True)
    place.write_text("")
    monkeypatch.syspath_prepend(tmp_path / "there")
    assert refused("strategy", "far-loom", "--into", tmp_path) == (
        f"a module 'torchweft_far_loom' can be imported already ({place}); choose another name, "
        "or uninstall it"
    )


# -- places and kinds that cannot be ---------------------------------------------------------------


def test_a_folder_with_something_in_it(tmp_path: Path) -> None:
    package = write(tmp_path, "strategy")
    mine = "kept"
    (package / "README.md").write_text(mine)
    assert refused("strategy", "far-loom", "--into", tmp_path) == (
        f"'{package}' exists and is not empty; choose another name, remove it, or name another "
        "place with --into"
    )
    assert (package / "README.md").read_text() == mine


def test_a_file_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "torchweft-far-loom"
    path.write_text("")
    assert refused("strategy", "far-loom", "--into", tmp_path) == (
        f"'{path}' exists and is a file; choose another name, remove it, or name another place "
        "with --into"
    )


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    said = refused("strategy", "far-loom", "--into", path)
    assert re.fullmatch(
        rf"cannot write '{re.escape(str(path))}.*': .+; name another place with --into", said
    ), said


@pytest.mark.parametrize(
    ("kind", "near"),
    [
        ("stratgy", "; did you mean 'strategy'?"),
        ("Launcher", "; did you mean 'launcher'?"),
        ("x", ";"),
    ],
)
def test_an_unknown_kind_names_the_nearest(kind: str, near: str, tmp_path: Path) -> None:
    assert refused(kind, "far-loom", "--into", tmp_path) == (
        f"no kind is called '{kind}'{near} kinds: accelerator, strategy, precision, launcher"
    )


def test_kind_and_name_in_the_wrong_order(tmp_path: Path) -> None:
    assert refused("mean", "strategy", "--into", tmp_path) == (
        "no kind is called 'mean'; the kind comes first: torchweft new strategy mean"
    )


@pytest.mark.parametrize("author", ["", " ", "Ada\nLovelace"])
def test_an_author_that_is_none(author: str, tmp_path: Path) -> None:
    assert refused("strategy", "far-loom", "--into", tmp_path, "--author", author) == (
        f"--author {author!r} is no name; write 'Ada Lovelace' or 'Ada Lovelace <ada@example.org>'"
    )
    assert list(tmp_path.iterdir()) == []


# -- as a command ----------------------------------------------------------------------------------


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "torchweft", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_error_is_a_line_and_a_status(tmp_path: Path) -> None:
    done = command("new", "stratgy", "mean", "--into", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: no kind is called 'stratgy'; did you mean 'strategy'? kinds: accelerator, "
        "strategy, precision, launcher\n"
    )


def test_the_kinds_are_completed() -> None:
    done = command(
        _TORCHWEFT_COMPLETE="bash_complete", COMP_WORDS="torchweft new p", COMP_CWORD="2"
    )
    assert done.stdout.split() == ["plain,precision"]


def test_writing_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from torchweft.cli import main\n"
        f"main(['new', 'strategy', 'far-loom', '--into', {str(tmp_path)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    imported = set(done.stderr.split())
    assert "torchweft.cli.new" in imported
    assert not {"torch", "numpy", "rich"} & imported
