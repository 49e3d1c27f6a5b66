"""What is wrong with a declared spec, found out before anybody asks for it."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from dataclasses import fields

from torchweft.options import fits, spell_type
from torchweft.specs import KINDS, Spec, is_target

__all__ = ["faults"]

#: What a user can write: requests are lower case, ``:`` and ``,`` set off options.
_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]*")


def faults(spec: Spec) -> list[str]:
    """One clause for each thing that makes a spec unusable; empty when it is sound."""
    # A field of the wrong type would make the other questions fail instead of answering them.
    return list(_wrong_types(spec)) or [
        *_names(spec),
        *_targets(spec),
        *_restrictions(spec),
    ]


def _wrong_types(spec: Spec) -> Iterator[str]:
    hints = typing.get_type_hints(type(spec))
    for name in (field.name for field in fields(spec)):
        value = getattr(spec, name)
        # A word where a tuple of words belongs would be taken apart into its letters.
        if not fits(value, hints[name]):
            yield f"{name}={value!r} is not of the type {spell_type(hints[name])}"


def _names(spec: Spec) -> Iterator[str]:
    for name in spec.names():
        if not _NAME.fullmatch(name) or name == "auto":
            yield (
                f"nobody can ask for the name {name!r}: names are lower case, of letters, digits, "
                "'_', '.', '+' and '-', and not 'auto'"
            )


def _targets(spec: Spec) -> Iterator[str]:
    for name, value in spec.targets().items():
        if not is_target(value):
            yield f"{name}={value!r} is not of the form 'package.module:attribute'"


def _restrictions(spec: Spec) -> Iterator[str]:
    later = KINDS[KINDS.index(spec.kind) + 1 :]
    for kind in spec.exclusive:
        if kind not in later:
            found = ", ".join(later) or "nothing"
            yield f"exclusive names '{kind}', but after the {spec.kind} comes {found}"
    if spec.devices and spec.kind == "accelerator":
        yield "devices restricts later kinds; an accelerator serves its own device"
    if spec.strategies and spec.kind in ("accelerator", "strategy"):
        yield f"strategies restricts later kinds; the {spec.kind} is chosen no later"
