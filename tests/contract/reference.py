"""The generated parts of ``docs/plugins``. ``python -m tests.contract.reference`` rewrites them.

A part stands between ``<!-- generated: hook torchweft_strategies -->`` and
``<!-- end of the generated part -->``; everything around it is written by hand.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.contract.signatures import Definition, Member, definition

__all__ = ["COMMAND", "PAGES", "PART", "meanings", "rewritten"]

PAGES = tuple(sorted((Path(__file__).parents[2] / "docs" / "plugins").glob("*.md")))

COMMAND = "python -m tests.contract.reference"

#: The sort of a part, what it is about, and its text.
PART = re.compile(
    r"(?<=<!-- generated: )(?P<sort>\w+) (?P<name>[\w.]+) -->\n(?P<text>.*?)"
    r"(?=<!-- end of the generated part -->)",
    re.DOTALL,
)

_WIDTH = 100


def rewritten(page: str) -> str:
    """A page with all of its generated parts as they have to be now."""

    def part(found: re.Match[str]) -> str:
        sort, name = found["sort"], found["name"]
        return f"{sort} {name} -->\n\n{_SORTS[sort](name)}\n\n"

    return PART.sub(part, page)


# -- hooks -------------------------------------------------------------------------------------


def _hook(name: str) -> str:
    found = definition("torchweft.hookspecs", name)
    text, sections = _sections(found.text)
    # With a body, so that it is Python that runs.
    parts = [f"```python\n{_folded(found.spelled)}: ...\n```", text]
    for title, said in sections.items():
        if title == "Args":
            parts += [f"- `{each}`: {meaning}" for each, meaning in _entries(said)]
        else:
            parts.append(f"**{title}:** {_flowing(said)}")
    return _markdown("\n\n".join(parts))


def _folded(signature: str) -> str:
    """A signature, with a line for each argument where it does not fit on one."""
    if len(signature) <= _WIDTH:
        return signature
    head, inside, rest = _split(signature)
    return "\n".join([f"{head}(", *(f"    {each}," for each in inside), f"){rest}"])


def _split(signature: str) -> tuple[str, list[str], str]:
    """Name, arguments and what follows the closing bracket."""
    begin = depth = 0
    inside: list[str] = []
    for place, letter in enumerate(signature):
        if letter in "([{":
            depth += 1
            begin = begin or place + 1
        elif letter in ")]}":
            depth -= 1
        if begin and ((letter == "," and depth == 1) or depth == 0) and place >= begin:
            inside.append(signature[begin:place].strip())
            begin = place + 1
            if depth == 0:
                return signature[: signature.index("(")], inside, signature[place + 1 :]
    raise ValueError(signature)


# -- specs -------------------------------------------------------------------------------------

#: Meanings of the fields of classes whose docstring has no list of them.


def _spec(name: str) -> str:
    found = definition("torchweft.specs", name)
    return _fields(found) or "It has no fields of its own."


def _record(name: str) -> str:
    module, _, own = name.rpartition(".")
    return _fields(definition(module, own))


def _fields(found: Definition) -> str:
    known = meanings(found)
    fields = [
        member
        for member in found.members()
        if member.sort == "attribute" and "ClassVar" not in (member.annotation or "")
    ]
    if not fields:
        return ""
    rows = [
        (
            f"`{field.name}`",
            _code(field.annotation or ""),
            "required" if field.default is None else _code(_plain_default(field.default)),
            _markdown(known[field.name]).rstrip("."),
        )
        for field in fields
    ]
    return _table(("field", "type", "default", "meaning"), rows)


def _plain_default(default: str) -> str:
    made = re.match(r"field\(default_factory=(\w+)", default)
    return f"{made[1]}()" if made else default


def meanings(found: Definition) -> dict[str, str]:
    """What the docstring of a class says about its attributes, by name."""
    _, sections = _sections(found.text)
    return dict(_entries(sections.get("Attributes", "")))


# -- base classes ------------------------------------------------------------------------------


def _members(name: str) -> str:
    found = definition("torchweft.api", name)
    lines = []
    above: Member | None = None
    for member in found.members():
        text = _first_paragraph(member.text)
        # Attributes that stand together share the comment above the first.
        if above is not None and not text and member.line == above.line + 1:
            text = _first_paragraph(above.text)
        else:
            above = member
        note = " (abstract)" if member.abstract else ""
        told = f": {text}" if text else ""
        lines.append(f"- `{member.spelled}`{note}{told}")
    return _markdown("\n".join(lines))


# -- the conformance kit -----------------------------------------------------------------------


def _attributes(name: str) -> str:
    found = definition("torchweft.testing", name)
    known = meanings(found)
    rows = [
        (
            f"`{member.name}`",
            _code(re.sub(r"ClassVar\[(.*)\]", r"\1", member.annotation or "")),
            _code(member.default or ""),
            _markdown(known[member.name]).rstrip("."),
        )
        for member in found.members()
        if member.sort == "attribute"
    ]
    return _table(("attribute", "type", "default", "meaning"), rows)


def _tests(name: str) -> str:
    found = definition("torchweft.testing", name)
    rows = [
        (f"`{member.name}`", _markdown(_first_paragraph(member.text)))
        for member in found.members()
        if member.name.startswith("test_")
    ]
    return _table(("test", "what it checks"), rows)


# -- docstrings --------------------------------------------------------------------------------

_TITLE = re.compile(r"^(Args|Returns|Raises|Attributes):[ \t]*$", re.MULTILINE)


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says before its sections, as paragraphs, and each section."""
    before, *rest = _TITLE.split(text)
    paragraphs = [_flowing(each) for each in before.strip().split("\n\n")]
    return "\n\n".join(paragraphs), dict(zip(rest[::2], rest[1::2], strict=True))


def _entries(section: str) -> Iterator[tuple[str, str]]:
    """``name: meaning`` of each entry; a line that is indented further continues one."""
    for entry in re.split(r"\n {4}(?=\S)", f"\n{section.strip(chr(10))}")[1:]:
        name, _, meaning = entry.partition(":")
        yield name, _flowing(meaning)


def _words(name: str) -> str:
    """A constant that is a mapping of words to what they mean."""
    found = definition("torchweft.api", name)
    assert isinstance(found.node, ast.Assign | ast.AnnAssign)
    call = found.node.value
    assert isinstance(call, ast.Call)
    words = ast.literal_eval(call.args[0])
    rows = [(f'`"{word}"`', meaning) for word, meaning in words.items()]
    return _table(("capability", "what it stands for"), rows)


def _keys(name: str) -> str:
    """What the mapping of a module of the kit has, in its order."""
    module, _, own = name.partition(".")
    found = definition(f"torchweft.testing.{module}", own)
    assert isinstance(found.node, ast.AnnAssign)
    assert isinstance(found.node.value, ast.Dict)
    keys = [ast.literal_eval(key) for key in found.node.value.keys if key is not None]
    return "\n".join(f"- {key}" for key in keys)


def _first_paragraph(text: str) -> str:
    return _flowing(text.split("\n\n")[0])


def _flowing(text: str) -> str:
    return " ".join(text.split())


def _markdown(text: str) -> str:
    return text.replace("``", "`") if "```" not in text else _outside_fences(text)


def _outside_fences(text: str) -> str:
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else part.replace("``", "`") for part in parts)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    # A bar within a cell would end it, also within code.
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


_SORTS: Mapping[str, Callable[[str], str]] = {
    "attributes": _attributes,
    "hook": _hook,
    "keys": _keys,
    "members": _members,
    "record": _record,
    "spec": _spec,
    "tests": _tests,
    "words": _words,
}


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
