"""Public names and their signatures, as the source spells them; nothing of torchweft is imported.

Reading the source rather than live objects makes the text the same under every Python and every
torch, and keeps annotations as they were written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

__all__ = ["CORE", "Definition", "Member", "definition", "listed"]

#: The folder that holds the package.
CORE = Path(__file__).parents[2] / "core"


@dataclass(frozen=True)
class Module:
    """A module that was parsed.

    Attributes:
        name: as it is imported.
        tree: what it says.
        lines: its source.
    """

    name: str
    tree: ast.Module
    lines: tuple[str, ...]

    def spelled(self, node: ast.expr | ast.stmt | ast.arg) -> str:
        """A part of the source on one line."""
        assert node.end_lineno is not None
        # Columns count bytes. (ast.get_source_segment takes the whole source apart every time.)
        parts = [line.encode() for line in self.lines[node.lineno - 1 : node.end_lineno]]
        parts[-1] = parts[-1][: node.end_col_offset]
        parts[0] = parts[0][node.col_offset :]
        text = b"\n".join(parts).decode()
        # A line break within brackets, and the comma before the last one, are layout.
        return re.sub(r",?\s*\n\s*([\])}])|([\[({])\s*\n\s*", r"\1\2", text).replace("\n", " ")

    def comment_above(self, node: ast.stmt) -> str:
        """The lines that begin with ``#:`` right above an attribute."""
        found: list[str] = []
        for line in reversed(self.lines[: node.lineno - 1]):
            if not line.strip().startswith("#:"):
                break
            found.insert(0, line.strip()[2:].strip())
        return " ".join(found)


@dataclass(frozen=True)
class Member:
    """An attribute, property or method that a class defines for others to use.

    Attributes:
        name: of it.
        sort: ``"attribute"``, ``"method"``, ``"property"``, ``"classmethod"`` or
            ``"staticmethod"``.
        spelled: name and signature, or ``"name: annotation = value"``.
        text: its docstring, or the comment above it.
        abstract: whether a subclass has to define it.
        line: where in its module it begins.
        annotation, default: of an attribute, as they are spelled; None where there is none.
    """

    name: str
    sort: str
    spelled: str
    text: str
    abstract: bool
    line: int
    annotation: str | None = None
    default: str | None = None


@dataclass(frozen=True)
class Definition:
    """A class, function or constant that has a public name."""

    module: Module
    name: str
    node: ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)

    @property
    def text(self) -> str:
        """The docstring, without indentation; empty where there is none."""
        if isinstance(self.node, ast.ClassDef | ast.FunctionDef):
            return ast.get_docstring(self.node) or ""
        return ""

    @property
    def spelled(self) -> str:
        """One line: ``"def f(x: int) -> str"``, ``"class A(B)"``, ``"NAME = 'value'"``."""
        if isinstance(self.node, ast.FunctionDef):
            return f"def {self.name}{_signature(self.module, self.node)}"
        if isinstance(self.node, ast.ClassDef):
            bases = ", ".join(self.module.spelled(base) for base in self.node.bases)
            return f"class {self.name}({bases})" if bases else f"class {self.name}"
        return " ".join(self.module.spelled(self.node).split())

    @cached_property
    def bases(self) -> tuple[Definition, ...]:
        """Those of its bases that are torchweft's own, in order."""
        assert isinstance(self.node, ast.ClassDef)
        names = [base.id for base in self.node.bases if isinstance(base, ast.Name)]
        return tuple(found for name in names if (found := _look_up(self.module.name, name)))

    @property
    def constructor(self) -> str | None:
        """The arguments of its own ``__init__``, where it has one."""
        assert isinstance(self.node, ast.ClassDef)
        for each in self.node.body:
            if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                return _signature(self.module, each)
        return None

    def members(self) -> Iterator[Member]:
        """What the class itself defines in public, in the order of the source."""
        assert isinstance(self.node, ast.ClassDef)
        for node in self.node.body:
            if isinstance(node, ast.FunctionDef) and _is_public(node.name):
                yield self._method(node)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                value = None if node.value is None else self.module.spelled(node.value)
                yield from self._attribute(
                    node, node.target.id, self.module.spelled(node.annotation), value
                )
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                yield from self._attribute(
                    node, node.targets[0].id, None, self.module.spelled(node.value)
                )

    def _method(self, node: ast.FunctionDef) -> Member:
        decorators = [self.module.spelled(each) for each in node.decorator_list]
        sorts = ("property", "classmethod", "staticmethod")
        sort = next((sort for sort in sorts if sort in decorators), "method")
        signature = _signature(self.module, node, bound=sort != "staticmethod")
        if sort == "property":
            signature = f": {signature.partition(' -> ')[2]}"
        return Member(
            name=node.name,
            sort=sort,
            spelled=f"{node.name}{signature}",
            text=ast.get_docstring(node) or "",
            abstract="abstractmethod" in decorators,
            line=node.lineno,
        )

    def _attribute(
        self, node: ast.stmt, name: str, annotation: str | None, value: str | None
    ) -> Iterator[Member]:
        if not _is_public(name):
            return
        typed = "" if annotation is None else f": {annotation}"
        yield Member(
            name=name,
            sort="attribute",
            spelled=f"{name}{typed}" if value is None else f"{name}{typed} = {value}",
            text=self.module.comment_above(node),
            abstract=False,
            line=node.lineno,
            annotation=annotation,
            default=value,
        )


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__call__"


def _signature(module: Module, node: ast.FunctionDef, *, bound: bool | None = None) -> str:
    """``"(x: int, *, y: str = '') -> bool"``; ``bound`` leaves the first argument out."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    is_method = bound if bound is not None else bool(positional) and positional[0].arg == "self"
    defaults = [*[None] * (len(positional) - len(given.defaults)), *given.defaults]
    parts = [_argument(module, *pair) for pair in zip(positional, defaults, strict=True)]
    if given.posonlyargs:
        parts.insert(len(given.posonlyargs), "/")
    if given.vararg is not None:
        parts.append(f"*{_argument(module, given.vararg, None)}")
    elif given.kwonlyargs:
        parts.append("*")
    pairs = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    parts += [_argument(module, *pair) for pair in pairs]
    if given.kwarg is not None:
        parts.append(f"**{_argument(module, given.kwarg, None)}")
    returns = "" if node.returns is None else f" -> {module.spelled(node.returns)}"
    return f"({', '.join(parts[1:] if is_method else parts)}){returns}"


def _argument(module: Module, node: ast.arg, default: ast.expr | None) -> str:
    # What a node of an argument spells includes its annotation.
    spelled = module.spelled(node)
    if default is None:
        return spelled
    return f"{spelled}{'=' if node.annotation is None else ' = '}{module.spelled(default)}"


# -- finding -----------------------------------------------------------------------------------


def listed(module: str) -> list[str]:
    """``__all__`` of a module, in its order."""
    found = _look_up(module, "__all__")
    assert found is not None, f"{module} has no __all__"
    assert isinstance(found.node, ast.Assign)
    names: list[str] = ast.literal_eval(found.node.value)
    return names


def definition(module: str, name: str) -> Definition:
    """Where a name that a module has comes from."""
    found = _look_up(module, name)
    assert found is not None, f"{module}.{name} is not defined by torchweft"
    return found


@cache
def _parsed(name: str) -> Module | None:
    path = CORE.joinpath(*name.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            source = file.read_text(encoding="utf-8")
            return Module(name, ast.parse(source), tuple(source.splitlines()))
    return None


def _look_up(module_name: str, name: str) -> Definition | None:
    module = _parsed(module_name)
    if module is None:
        return None
    for node in _statements(module.tree.body):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module is not None:
                    return _look_up(node.module, alias.name)
        elif name in _names(node):
            assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign)
            return Definition(module, name, node)
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, what only a type checker reads included."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements(node.body)
        else:
            yield node


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = {ast.Assign: "targets", ast.AnnAssign: "target"}.get(type(node))
    found = getattr(node, targets) if targets else []
    each = found if isinstance(found, list) else [found]
    return [target.id for target in each if isinstance(target, ast.Name)]
