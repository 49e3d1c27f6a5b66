"""Entry points become ``Found`` records. The one user of importlib-metadata.

Own discovery rather than pluggy's ``load_setuptools_entrypoints``: that lets one broken plugin
raise, unnamed, and take the others with it.
"""

from __future__ import annotations

import importlib
import re
import traceback
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torchweft.errors import BrokenPlugin
from torchweft.hookspecs import NAME

if TYPE_CHECKING:
    from importlib_metadata import EntryPoint

__all__ = ["Found", "canonical", "discover"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One installed plugin: its module, or why there is none.

    Attributes:
        name: of the entry point; what ``TORCHWEFT_DISABLE_PLUGINS`` takes.
        distribution: that provides it.
        version: of the distribution.
        module: of hooks; None when it could not be imported or was not asked for.
        error: why it could not be imported, ``"ModuleNotFoundError: No module named 'x'"``.
        trace: the traceback of that error.
        disabled: whether it was left alone because its name is blocked.
    """

    name: str
    distribution: str
    version: str
    module: ModuleType | None = None
    error: str = ""
    trace: str = ""
    disabled: bool = False

    @property
    def provider(self) -> str:
        """``"distribution version"``, as messages name it."""
        return f"{self.distribution} {self.version}".strip()


def canonical(distribution: str) -> str:
    """The one spelling of a distribution's name: ``"Torchweft_CUDA"`` is ``"torchweft-cuda"``."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def discover(group: str = NAME, blocked: frozenset[str] = frozenset()) -> list[Found]:
    """Import every plugin that an entry point of ``group`` names, sorted by name.

    A plugin that fails is returned with its error; those in ``blocked`` are not imported.
    """
    # Imported here: it is only needed once a plan is made or a listing printed.
    import importlib_metadata

    found: dict[tuple[str, str], Found] = {}
    for distribution in importlib_metadata.distributions():
        try:
            entry_points = [e for e in distribution.entry_points if e.group == group]
        except Exception as error:
            if not _mentions(distribution, group):
                continue
            owner, version = _owner(distribution)
            record = _failed(owner, owner, version, error)
            found.setdefault((canonical(owner), owner), record)
            continue
        for entry_point in entry_points:
            owner, version = _owner(distribution)
            key = canonical(owner), entry_point.name
            # The first on sys.path is the one that Python imports; a second copy is shadowed.
            if key not in found:
                found[key] = _load(entry_point, owner, version, entry_point.name in blocked)
    return [found[key] for key in sorted(found, key=lambda key: (key[1], key[0]))]


def _mentions(distribution: Any, group: str) -> bool:
    # A file of entry points that nobody can read may be anybody's; most are no concern of ours.
    try:
        return f"[{group}]" in (distribution.read_text("entry_points.txt") or "")
    except Exception:
        return False


def _owner(distribution: Any) -> tuple[str, str]:
    # A half-removed distribution has entry points left and no metadata, or no name in it.
    try:
        metadata = distribution.metadata
        return metadata["Name"] or "an unnamed distribution", metadata["Version"] or ""
    except Exception:
        return "an unnamed distribution", ""


def _load(entry_point: EntryPoint, distribution: str, version: str, disabled: bool) -> Found:
    if disabled:
        return Found(
            name=entry_point.name, distribution=distribution, version=version, disabled=True
        )
    try:
        if entry_point.attr:
            raise BrokenPlugin(
                f"its entry point '{entry_point.value}' names an attribute; "
                "it has to name a module of hooks"
            )
        module = importlib.import_module(entry_point.module)
    # SystemExit too: a plugin that calls sys.exit() while it is imported must not end the listing.
    except (Exception, SystemExit) as error:
        return _failed(entry_point.name, distribution, version, error)
    return Found(name=entry_point.name, distribution=distribution, version=version, module=module)


def _failed(name: str, distribution: str, version: str, error: BaseException) -> Found:
    return Found(
        name=name,
        distribution=distribution,
        version=version,
        error=f"{type(error).__name__}: {error}",
        trace="".join(traceback.format_exception(error)),
    )
