"""The errors for what was asked for and cannot be had: who would provide it, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from torchweft.catalog import Catalog, Entry
from torchweft.discovery import canonical
from torchweft.errors import (
    BrokenPlugin,
    NameClash,
    NotAvailable,
    TorchweftError,
    UnknownName,
    did_you_mean,
)
from torchweft.known import COMMON, KNOWN, OTHER_WORDS
from torchweft.manager import Declared

__all__ = ["clashing", "package_to_install", "unknown_name"]


def unknown_name(kind: str, name: str, catalog: Catalog, *, source: str = "") -> TorchweftError:
    """The error for a name that nobody declares.

    ``source``: the flag or variable that asked for it, where that was not the script.
    """
    asked = f"'{name}'{f' ({source})' if source else ''}"
    distribution = KNOWN.get((kind, name))
    if distribution is not None:
        return _known_name(kind, asked, distribution, catalog)
    declared = catalog.names(kind)
    elsewhere = [known for known_kind, known in KNOWN if known_kind == kind]
    meant = OTHER_WORDS.get((kind, name.lower()))
    near = (
        f"; did you mean {' or '.join(map(repr, meant))}?"
        if meant
        else did_you_mean(name, {*declared, *elsewhere, "auto"}) or ";"
    )
    here = sorted({"auto", *(entry.spec.name for entry in catalog.entries(kind))})
    message = f"no {kind} is called {asked}{near} known here: {', '.join(here)}"
    suspects = [*catalog.broken, *(plugin for plugin in catalog.declared if plugin.disabled)]
    if not suspects:
        return UnknownName(message)
    message += f"; it might come from a plugin that is not loaded: {_absences(suspects)}"
    # A slip of the pen is the likelier cause where a name that is there is near.
    slip = did_you_mean(name, declared)
    return UnknownName(message) if slip or not catalog.broken else BrokenPlugin(message)


def _known_name(kind: str, asked: str, distribution: str, catalog: Catalog) -> TorchweftError:
    installed = _plugins_of(distribution, catalog)
    if not installed:
        return NotAvailable(
            f"{kind} {asked} is in a package that is not installed; try: pip install {distribution}"
        )
    absent = [plugin for plugin in installed if plugin.error or plugin.disabled]
    if not absent:
        return NotAvailable(
            f"{kind} {asked} is not in {installed[0].provider}, which is installed; "
            f"try: pip install --upgrade {distribution}"
        )
    message = f"{kind} {asked} cannot be used: {_absences(absent)}"
    broken = any(plugin.error for plugin in absent)
    return BrokenPlugin(message) if broken else NotAvailable(message)


def package_to_install(kind: str, name: str | None, catalog: Catalog) -> str:
    """The clause that says what else would provide ``name``; empty when nothing would.

    Without a name: what would provide the common one of that kind, where there is one.
    """
    wanted = name or COMMON.get(kind, "")
    distribution = KNOWN.get((kind, wanted))
    if distribution is None:
        return ""
    installed = _plugins_of(distribution, catalog)
    if not installed:
        return (
            f"; '{wanted}' is in a package that is not installed; try: pip install {distribution}"
        )
    absent = [plugin for plugin in installed if plugin.error or plugin.disabled]
    return f"; {_absences(absent)}" if absent else ""


def clashing(
    kind: str, name: str, pair: tuple[Entry, Entry], *, source: str = ""
) -> TorchweftError:
    """The error for a name that two plugins declare for the same case."""
    asked = f"'{name}'{f' ({source})' if source else ''}"
    first, second = pair
    plugins = sorted({entry.plugin for entry in pair if entry.plugin})
    if first.provider == second.provider and len(plugins) < 2:
        return NameClash(
            f"{kind} {asked} is declared twice by {first.provider}, for the same devices and "
            f"strategies; report this to its authors"
        )
    # Plugins of one name are disabled together.
    leave_out = " or ".join(f"TORCHWEFT_DISABLE_PLUGINS={plugin}" for plugin in plugins)
    return NameClash(
        f"{kind} {asked} is declared by both {first.provider} and {second.provider}, for the same "
        "devices and strategies; uninstall one of them"
        + (f", or leave one out with {leave_out}" if len(plugins) > 1 else "")
    )


def _plugins_of(distribution: str, catalog: Catalog) -> list[Declared]:
    return [
        plugin
        for plugin in catalog.declared
        if canonical(plugin.distribution) == canonical(distribution)
    ]


def _absences(plugins: Sequence[Declared]) -> str:
    return "; ".join(
        plugin.failure
        if plugin.error
        else f"plugin '{plugin.plugin}' ({plugin.provider}) is disabled by "
        "TORCHWEFT_DISABLE_PLUGINS"
        for plugin in plugins
    )
