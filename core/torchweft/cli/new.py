"""``torchweft new``: a package to start a backend from, which works as it is written."""

from __future__ import annotations

import importlib.util
import json
import keyword
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path, PurePosixPath
from string import Template
from typing import TYPE_CHECKING

import click

from torchweft import __version__
from torchweft.catalog import Catalog
from torchweft.discovery import canonical
from torchweft.errors import InvalidRequest, did_you_mean
from torchweft.known import KNOWN
from torchweft.manager import Declared, Manager
from torchweft.specs import KINDS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["new"]

#: Where the text of each template goes; both have words to be filled in.
_COMMON = {
    "common/pyproject.toml": "pyproject.toml",
    "common/CHANGELOG.md": "CHANGELOG.md",
    "common/gitignore": ".gitignore",
    "common/workflow.yml": ".github/workflows/test.yml",
    "common/init.py": "$module/__init__.py",
    "common/py.typed": "$module/py.typed",
    "$kind/README.md": "README.md",
    "$kind/hooks.py": "$module/hooks.py",
    "$kind/$kind.py": "$module/$kind.py",
    "$kind/test.py": "tests/test_$word.py",
}

#: What a kind has beside these.
_FURTHER: Mapping[str, Sequence[str]] = {
    "accelerator": ("probe.py",),
    "launcher": ("detect.py", "start.py"),
}

_SUMMARIES = {
    "accelerator": "An accelerator for torchweft.",
    "strategy": "A strategy for torchweft.",
    "precision": "A precision for torchweft.",
    "launcher": "A launcher for torchweft.",
}

#: The last of the commands to go on with: that torchweft has found the plugin.
_PLANS = {
    "accelerator": "torchweft plan --accelerator $name",
    "strategy": "torchweft plan --strategy $name --accelerator cpu --devices 2",
    "precision": "torchweft plan --precision $name",
    # Whatever starts from outside can be decided in its own processes alone.
    "launcher": "python -m $module.start -n 1 torchweft plan --launcher $name",
}

#: What the name of a distribution, a module and a spec can all be made of.
_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
#: So that no line of what is written becomes longer than 100 columns.
_LONGEST = 25


def _complete_kind(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(kind) for kind in KINDS if kind.startswith(incomplete)]


@click.command(no_args_is_help=True)
@click.argument("kind", shell_complete=_complete_kind)
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=Path(),
    metavar="FOLDER",
    help="Where the folder of the package is made.  [default: the current folder]",
)
@click.option("--author", metavar="NAME", help="Such as 'Ada Lovelace <ada@example.org>'.")
def new(kind: str, name: str, into: Path, author: str | None) -> None:
    """Write a package torchweft-NAME with a backend called NAME to start from. KIND is one of
    accelerator, strategy, precision and launcher.

    What is written works: it installs, and passes the tests that it comes with, which are those
    of torchweft's conformance kit. NAME is what users will write, such as strategy="NAME".
    """
    _check_kind(kind, name)
    _check_name(kind, name)
    _check_free(kind, name, Manager.from_entry_points(os.environ).declared)
    words = _words(kind, name, author)
    folder = into / words["distribution"]
    _check_folder(folder)
    texts = _render(kind, words)
    _write(folder, texts)
    plan = Template(_PLANS[kind]).substitute(words)
    click.echo(f"wrote {folder}{os.sep}")
    for path in sorted(texts):
        click.echo(f"  {path}")
    click.echo(
        "\nIt has no licence yet: add a file LICENSE, and its name in pyproject.toml.\n\n"
        "To go on:\n"
        f"  pip install -e {shlex.quote(f'{folder}[test]')}\n"
        f"  pytest {shlex.quote(str(folder))}\n"
        f"  {plan}"
    )


# -- what cannot be --------------------------------------------------------------------------------


def _check_kind(kind: str, name: str) -> None:
    if kind in KINDS:
        return
    if name in KINDS:
        raise InvalidRequest(
            f"no kind is called '{kind}'; the kind comes first: torchweft new {name} {kind}"
        )
    near = did_you_mean(kind.lower(), KINDS) or ";"
    raise InvalidRequest(f"no kind is called '{kind}'{near} kinds: {', '.join(KINDS)}")


def _check_name(kind: str, name: str) -> None:
    if name.startswith("torchweft-") and _NAME.fullmatch(name):
        raise InvalidRequest(
            f"'{name}' would make the package 'torchweft-{name}'; the prefix is added by itself, "
            f"try: torchweft new {kind} {name.removeprefix('torchweft-')}"
        )
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"'{name}' cannot be the name of a package: a name is of lower-case letters and "
            "digits, begins with a letter, and has single '-' or '_' between words"
            f"{_instead(kind, name)}"
        )
    if len(name) > _LONGEST:
        raise InvalidRequest(
            f"'{name}' has {len(name)} characters; a name that users write has {_LONGEST} at most"
        )
    if keyword.iskeyword(name) or name == "auto":
        whose = "of Python" if keyword.iskeyword(name) else "of torchweft, for leaving it open"
        raise InvalidRequest(
            f"'{name}' is a word {whose}; choose another name, such as '{name}-{kind}'"
        )


def _instead(kind: str, name: str) -> str:
    """A valid name that is near, where there is one."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name)
    words = re.findall(r"[a-z0-9]+", split.lower())
    near = "-".join(words).lstrip("-0123456789")
    return f"; try: torchweft new {kind} {near}" if _NAME.fullmatch(near) else ""


def _check_free(kind: str, name: str, declared: Sequence[Declared]) -> None:
    """Whether nobody has the name, here or elsewhere: two of a name cannot be told apart."""
    other = "choose another name"
    for entry in Catalog(declared).named(kind, name):
        raise InvalidRequest(
            f"{kind} '{name}' is there already: {entry.provider} declares "
            f"'{entry.spec.name}'; {other}"
        )
    if (kind, name) in KNOWN:
        raise InvalidRequest(
            f"{kind} '{name}' is in the package {KNOWN[kind, name]}, which would clash with "
            f"yours where both are installed; {other}"
        )
    distribution = canonical(f"torchweft-{name}")
    for plugin in declared:
        if canonical(plugin.distribution) == distribution or plugin.plugin == name:
            raise InvalidRequest(
                f"a plugin '{plugin.plugin}' is installed already, from {plugin.provider}; {other}"
            )
    if distribution in KNOWN.values():
        raise InvalidRequest(f"{distribution} is a package of the torchweft project; {other}")
    module = _module(name)
    found = importlib.util.find_spec(module)
    if found is not None:
        places = [found.origin, *(found.submodule_search_locations or ())]
        place = next((place for place in places if place), "built in")
        raise InvalidRequest(
            f"a module '{module}' can be imported already ({place}); {other}, or uninstall it"
        )


def _check_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise InvalidRequest(
            f"'{folder}' exists and {what}; choose another name, remove it, or name another place "
            "with --into"
        )


# -- what is written -------------------------------------------------------------------------------


def _words(kind: str, name: str, author: str | None) -> dict[str, str]:
    """What the templates leave open."""
    word = name.replace("-", "_")
    distribution = canonical(f"torchweft-{name}")
    return {
        "kind": kind,
        "name": name,
        "word": word,
        "module": _module(name),
        "prefix": word.upper(),
        "cls": _class(kind, word.split("_")),
        "distribution": distribution,
        "summary": _SUMMARIES[kind],
        "torchweft_range": _range(__version__),
        "authors": _author(f"The {distribution} authors" if author is None else author),
    }


def _class(kind: str, words: Sequence[str]) -> str:
    """``MeanStrategy``; of ``mean-strategy`` too, and of ``strategy`` ``StrategyStrategy``."""
    said = len(words) > 1 and words[-1] == kind
    return "".join(map(str.capitalize, words if said else [*words, kind]))


def _module(name: str) -> str:
    return f"torchweft_{name.replace('-', '_')}"


def _range(version: str) -> str:
    """The versions of torchweft that what is written for ``version`` goes with."""
    major, minor = map(int, version.split(".")[:2])
    # ">=0.1" would not take 0.1.0rc1.
    least = f"{major}.{minor}" if version.replace(".", "").isdigit() else version
    return f">={least},<{major}.{minor + 1}"


def _author(author: str) -> str:
    """A person as ``pyproject.toml`` has one."""
    if not author.isprintable() or not author.strip():
        raise InvalidRequest(
            f"--author {author!r} is no name; write 'Ada Lovelace' or "
            "'Ada Lovelace <ada@example.org>'"
        )
    both = re.fullmatch(r"\s*([^<>]*[^<>\s])\s*<([^<>\s]+@[^<>\s]+)>\s*", author)
    person = {"name": both[1], "email": both[2]} if both else {"name": author.strip()}
    # What JSON quotes is quoted the same in TOML.
    fields = (f"{key} = {json.dumps(text, ensure_ascii=False)}" for key, text in person.items())
    return f"{{ {', '.join(fields)} }}"


def _render(kind: str, words: Mapping[str, str]) -> dict[str, str]:
    """The text of every file, by its path in the package's folder."""
    places = _COMMON | {f"$kind/{file}": f"$module/{file}" for file in _FURTHER.get(kind, ())}
    folder = files("torchweft.cli") / "templates"
    texts: dict[str, str] = {}
    for source, target in places.items():
        path = Template(f"{source}.template").substitute(words)
        text = folder.joinpath(*PurePosixPath(path).parts).read_text(encoding="utf-8")
        texts[Template(target).substitute(words)] = Template(text).substitute(words)
    return texts


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    try:
        for name, text in texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InvalidRequest(
            f"cannot write '{error.filename or folder}': {error.strerror}; name another place "
            "with --into"
        ) from error
