"""A snapshot of everything public, one name a line; ``python -m tests.contract.api`` writes it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from pathlib import Path

import click
from tests.contract.reference import meanings
from tests.contract.signatures import Definition, definition, listed

__all__ = ["MODULES", "REACHED", "SNAPSHOT", "difference", "snapshot"]

SNAPSHOT = Path(__file__).with_name("api.txt")

#: What is promised to users and to plugin authors.
MODULES = (
    "torchweft",
    "torchweft.api",
    "torchweft.api.deferred",
    "torchweft.errors",
    "torchweft.hookspecs",
    "torchweft.launching",
    "torchweft.loggers",
    "torchweft.specs",
    "torchweft.testing",
)

#: Classes of objects that public names hand out, and that nobody has to import.
REACHED = (
    ("torchweft.accumulation", "Accumulation"),
    ("torchweft.plan", "Decision"),
    ("torchweft.plan", "Rejected"),
    ("torchweft.plan", "Topology"),
)

_COMMAND = "python -m tests.contract.api"


def snapshot() -> str:
    """The text as it has to be now."""
    lines = [f"# Every public name and its signature. Written by: {_COMMAND}"]
    for module in MODULES:
        lines += ["", f"[{module}]"]
        for name in sorted(listed(module)):
            lines += _name(module, name)
    lines += ["", "[reached through a public name]"]
    for module, name in REACHED:
        lines += _defined(definition(module, name))
    lines += ["", "[fixtures of torchweft.testing]", *_fixtures()]
    lines += ["", "[the command torchweft]", *_commands()]
    return "\n".join(lines) + "\n"


def difference(old: str, new: str) -> str:
    """What to tell whoever changed something; empty where nothing changed."""
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), "promised", "now", n=0, lineterm=""
    )
    changed = "\n".join(lines)
    return changed and (
        f"{changed}\n\nThe public names or signatures changed. If that is meant, run\n"
        f"    {_COMMAND}\nand add a line to CHANGELOG.md. What is removed, renamed or gets "
        "stricter\nis deprecated first: docs/plugins/compatibility.md says how."
    )


def _name(module: str, name: str) -> Iterator[str]:
    found = definition(module, name)
    home = found.module.name
    if home != module and home in MODULES:
        yield f"{name} = {home}.{found.name}"
    elif name.startswith("__"):
        yield name  # a version changes without a promise being broken
    else:
        yield from _defined(found)


def _defined(found: Definition) -> Iterator[str]:
    decorators = (found.module.spelled(each) for each in getattr(found.node, "decorator_list", []))
    yield "".join([*(f"@{each} " for each in decorators if each[0] != "_"), found.spelled])
    if not found.is_class:
        return
    if found.constructor is not None and not _is_reached(found):
        yield f"{found.name}.__init__{found.constructor}"
    lines: dict[str, str] = {}
    for cls in _own_and_unlisted(found):
        for member in cls.members():
            # Of the kit's classes the attributes are promised, not which tests there are.
            if found.name.endswith("Conformance") and member.sort != "attribute":
                continue
            sort = "" if member.sort in ("method", "attribute") else f"  [{member.sort}]"
            abstract = "  [abstract]" if member.abstract else ""
            lines.setdefault(member.name, f"{found.name}.{member.spelled}{sort}{abstract}")
    # Those that a constructor makes stand in the docstring alone.
    for name in meanings(found):
        lines.setdefault(name, f"{found.name}.{name}")
    yield from lines.values()


def _own_and_unlisted(found: Definition) -> Iterator[Definition]:
    """The class, and those of its bases that have no entry of their own."""
    yield found
    for base in found.bases:
        if not _is_listed(base):
            yield from _own_and_unlisted(base)


def _is_listed(found: Definition) -> bool:
    return _is_reached(found) or any(found.name in listed(module) for module in MODULES)


def _is_reached(found: Definition) -> bool:
    return (found.module.name, found.name) in REACHED


def _fixtures() -> Iterator[str]:
    """The pytest fixtures, which tests ask for by name."""
    module = "torchweft.testing.fixtures"
    for name in sorted(listed(module)):
        yield definition(module, name).spelled.removeprefix("def ")


def _commands() -> Iterator[str]:
    cli = importlib.import_module("torchweft.cli")
    for name, (target, _) in sorted(cli._COMMANDS.items()):
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        yield from _command(name, command)


def _command(name: str, command: click.Command) -> Iterator[str]:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    words = [f"{(p.name or '').upper()}{'...' if p.nargs != 1 else ''}" for p in arguments]
    yield " ".join([name, *words])
    for option in (p for p in command.params if isinstance(p, click.Option)):
        flags = "/".join([*option.opts, *option.secondary_opts])
        yield f"{name} {flags}" + ("" if option.is_flag else f" {option.metavar or 'VALUE'}")
    for sub, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _command(f"{name} {sub}", inner)


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
