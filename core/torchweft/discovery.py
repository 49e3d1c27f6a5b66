"""Entry points become ``Found`` records. The one user of importlib-metadata.

Own discovery rather than pluggy's ``load_setuptools_entrypoints``: that lets one broken plugin
raise, unnamed, and take the others with it.
"""

from __future__ import annotations

import importlib
import traceback
from dataclasses import dataclass
from types import ModuleType

from torchweft.hookspecs import NAME

__all__ = ["Found", "discover"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One installed plugin: its module, or why it could not be imported."""

    name: str
    distribution: str
    version: str
    module: ModuleType | None = None
    error: str = ""
    trace: str = ""

    @property
    def provider(self) -> str:
        """``"distribution version"``, as messages name it."""
        return f"{self.distribution} {self.version}".strip()


def discover(group: str = NAME, blocked: frozenset[str] = frozenset()) -> list[Found]:
    """Import every plugin that an entry point of ``group`` names, sorted by name.

    A plugin that fails is returned with its error; those in ``blocked`` are not imported.
    """
    # Imported here: it is only needed once a plan is made or a listing printed.
    import importlib_metadata

    found: dict[tuple[str, str], Found] = {}
    for distribution in importlib_metadata.distributions():
        for entry_point in distribution.entry_points:
            if entry_point.group != group or entry_point.name in blocked:
                continue
            owner = distribution.metadata["Name"] or "an unnamed distribution"
            # The first on sys.path is the one that Python imports; a second copy is shadowed.
            if (owner, entry_point.name) not in found:
                found[owner, entry_point.name] = _load(
                    entry_point.name, entry_point.value, owner, distribution.version or ""
                )
    return [found[key] for key in sorted(found, key=lambda key: (key[1], key[0]))]


def _load(name: str, value: str, distribution: str, version: str) -> Found:
    try:
        module = importlib.import_module(value.partition(":")[0])
    # SystemExit too: a plugin that calls sys.exit() while it is imported must not end the listing.
    except (Exception, SystemExit) as error:
        return Found(
            name=name,
            distribution=distribution,
            version=version,
            error=f"{type(error).__name__}: {error}",
            trace=traceback.format_exc(),
        )
    return Found(name=name, distribution=distribution, version=version, module=module)
