"""Objects that the user made: which spec each one is an instance of."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torchweft.api import Accelerator, Launcher, Precision, Strategy
from torchweft.catalog import Catalog, Entry
from torchweft.errors import InvalidRequest
from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, Spec, StrategySpec

__all__ = ["entry_for", "kind_of", "sort_plugins"]

_BASES: Mapping[str, type] = {
    "accelerator": Accelerator,
    "strategy": Strategy,
    "precision": Precision,
    "launcher": Launcher,
}


def kind_of(value: Any) -> str | None:
    """The kind of a live object, or None when it is none of the four."""
    return next((kind for kind, base in _BASES.items() if isinstance(value, base)), None)


def entry_for(kind: str, value: Any, catalog: Catalog) -> Entry:
    """The spec whose target is the object's class or its nearest base, or an anonymous one."""
    entries = catalog.entries(kind)
    for cls in type(value).__mro__:
        for entry in entries:
            if _loaded(entry.spec.target) is cls:
                return entry
    return Entry(spec=_anonymous(kind, value), provider=f"the class {type(value).__qualname__}")


def _loaded(target: str) -> Any:
    """What a target names, if its module was imported; a class whose object exists was."""
    module, _, attribute = target.partition(":")
    found: Any = sys.modules.get(module)
    for part in attribute.split("."):
        found = getattr(found, part, None)
    return found


def _anonymous(kind: str, value: Any) -> Spec:
    cls: Any = type(value)
    common: dict[str, Any] = {
        "name": getattr(cls, "name", "") or cls.__name__.lower(),
        "target": f"{cls.__module__}:{cls.__qualname__}",
        "summary": (inspect.getdoc(cls) or "").split("\n")[0],
    }
    if kind == "accelerator":
        # Without a spec nothing names the device type; torch's word for it is the class's name.
        return AcceleratorSpec(device=getattr(cls, "device_type", common["name"]), **common)
    if kind == "strategy":
        return StrategySpec(devices=tuple(cls.devices), processes=cls.processes, **common)
    if kind == "precision":
        return PrecisionSpec(**common)
    return LauncherSpec(nodes="any", **common)


def sort_plugins(plugins: Any) -> tuple[dict[str, Any], list[ModuleType]]:
    """Split ``plugins=`` into live objects by kind, one of a kind, and modules of hooks."""
    objects: dict[str, Any] = {}
    modules: list[ModuleType] = []
    listed = plugins if isinstance(plugins, list | tuple) else [plugins]
    for value in (plugin for plugin in listed if plugin is not None):
        if isinstance(value, ModuleType):
            modules.append(value)
            continue
        kind = kind_of(value)
        if kind is None:
            raise InvalidRequest(
                f"plugins= has {value!r}, a {type(value).__name__}; it takes live Precision, "
                "Launcher, Strategy or Accelerator objects and modules of hooks"
            )
        if kind in objects:
            raise InvalidRequest(
                f"plugins= has two of kind {kind}: {type(objects[kind]).__name__} and "
                f"{type(value).__name__}; keep one"
            )
        objects[kind] = value
    return objects, modules
