"""What the user asked for: the arguments of ``Fabric``, flags of the command, the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torchweft.errors import InvalidRequest
from torchweft.handoff import Handoff
from torchweft.specs import KINDS

__all__ = ["Devices", "RunRequest", "parse_devices", "parse_name", "parse_num_nodes"]

#: A number of devices, chosen indices, all that there are, or None for the accelerator's default.
Devices = int | tuple[int, ...] | Literal["all"] | None

#: Words that mean that the user leaves a choice to torchweft.
_OPEN = (None, "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What was asked for. None means that it was left open.

    ``options`` holds, by kind, the options written behind a name (``"ddp:static_graph=true"``).
    """

    accelerator: str | None = None
    devices: Devices = None
    num_nodes: int | tuple[int, int] | None = None
    strategy: str | None = None
    precision: str | None = None
    launcher: str | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def parse(cls, **given: Any) -> RunRequest:
        """Build a request from values as a user writes them; checks form, not existence.

        Takes ``accelerator, devices, num_nodes, strategy, precision, launcher``. Raises
        ``InvalidRequest``.
        """
        values: dict[str, Any] = {}
        options: dict[str, Mapping[str, Any]] = {}
        for kind in KINDS:
            name, chosen = parse_name(kind, given.get(kind))
            values[kind] = name
            if chosen:
                options[kind] = chosen
        values["devices"] = parse_devices(given.get("devices"))
        values["num_nodes"] = parse_num_nodes(given.get("num_nodes"))
        return cls(options=options, **values)

    def with_environment(self, environ: Mapping[str, str]) -> RunRequest:
        """Fill in what was left open from the flags of ``torchweft run`` and the environment.

        A flag and an argument that disagree are an error that names both. Raises
        ``InvalidRequest``.
        """
        request = self
        handoff = Handoff.read(environ)
        if handoff is not None and handoff.flags:
            flags = RunRequest.parse(**handoff.flags)
            request = request._merge(flags, lambda name: f"--{name.replace('_', '-')}")
        launcher = environ.get("TORCHWEFT_LAUNCHER")
        if launcher:
            wanted = RunRequest.parse(launcher=launcher)
            request = request._merge(wanted, lambda name: "TORCHWEFT_LAUNCHER")
        return request

    def _merge(self, other: RunRequest, spell: Any) -> RunRequest:
        merged: dict[str, Any] = {}
        for name in (f.name for f in fields(self) if f.name != "options"):
            mine, theirs = getattr(self, name), getattr(other, name)
            # "ddp" in the script and "ddp:static_graph=true" as a flag also disagree.
            mine_all = (mine, dict(self.options.get(name, {})))
            theirs_all = (theirs, dict(other.options.get(name, {})))
            if mine is not None and theirs is not None and mine_all != theirs_all:
                raise InvalidRequest(
                    f"{spell(name)} says {_spell(*theirs_all)} and the script says "
                    f"Fabric({name}={_spell(*mine_all)!s}); leave one of them out, or make them "
                    "equal"
                )
            merged[name] = theirs if mine is None else mine
        return RunRequest(options={**other.options, **self.options}, **merged)


def _spell(value: Any, options: Mapping[str, Any]) -> str:
    if options:
        return repr(f"{value}:" + ",".join(f"{k}={v}" for k, v in options.items()))
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def parse_name(kind: str, value: Any) -> tuple[str | None, dict[str, Any]]:
    """Split ``"name:option=value,option=value"``; None and ``"auto"`` leave the choice open."""
    if value in _OPEN:
        return None, {}
    if kind == "precision" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise InvalidRequest(
            f"{kind}={value!r} is a {type(value).__name__}; it takes a name, "
            f"or an instance of a {kind} class"
        )
    name, _, rest = value.partition(":")
    name = name.strip().lower()
    if not name:
        raise InvalidRequest(f"{kind}={value!r} names nothing; it takes a name or 'auto'")
    return name, _parse_options(kind, value, rest)


def _parse_options(kind: str, whole: str, rest: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier():
            raise InvalidRequest(
                f"{kind}={whole!r} has '{part}' where an option belongs; "
                f"write {kind}='name:option=value,option=value'"
            )
        if key in options:
            raise InvalidRequest(f"{kind}={whole!r} gives the option '{key}' twice")
        options[key] = _parse_value(value)
    return options


def _parse_value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def parse_devices(value: Any) -> Devices:
    """Read ``devices=``: a count, ``"auto"``, ``"all"`` or -1, indices as a list or ``"0,2"``.

    A string of digits is a count, as on a command line; ``"1,"`` is the device with index 1.
    """
    original = value
    if isinstance(value, str):
        value = _parse_device_text(value.strip().lower())
    if value in _OPEN and not isinstance(value, bool):
        return None
    if value == "all":
        return "all"
    if isinstance(value, bool) or not isinstance(value, int | Sequence) or isinstance(value, str):
        raise InvalidRequest(
            f"devices={original!r} is not understood; it takes a number of devices, 'auto', "
            "'all', or a list of indices such as [0, 2] or '0,2'"
        )
    if isinstance(value, int):
        if value == -1:
            return "all"
        if value < 1:
            raise InvalidRequest(
                f"devices={original!r} asks for {value} devices; it takes 1 or more, "
                "or -1 ('all') for all that there are"
            )
        return value
    return _parse_indices(original, value)


def _parse_device_text(text: str) -> Any:
    if text in ("", "auto"):
        return None if text else "none given"
    if text == "all":
        return text
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"(\s*-?\d+\s*,)*\s*-?\d*\s*,?", text):
        return [int(piece) for piece in text.split(",") if piece.strip()]
    return text


def _parse_indices(original: Any, value: Sequence[Any]) -> tuple[int, ...]:
    if not value or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise InvalidRequest(f"devices={original!r} is not a list of device indices")
    negative = [i for i in value if i < 0]
    if negative:
        raise InvalidRequest(f"devices={original!r} has the negative index {negative[0]}")
    twice = [i for i in value if value.count(i) > 1]
    if twice:
        raise InvalidRequest(
            f"devices={original!r} names device {twice[0]} more than once; "
            "each process needs a device of its own"
        )
    return tuple(value)


def parse_num_nodes(value: Any) -> int | tuple[int, int] | None:
    """Read ``num_nodes=``: a count, or ``"least:most"`` for an elastic run."""
    original = value
    if value in _OPEN and not isinstance(value, bool):
        return None
    if isinstance(value, str):
        pieces = value.split(":")
        if not all(re.fullmatch(r"\s*\d+\s*", piece) for piece in pieces) or len(pieces) > 2:
            raise InvalidRequest(f"num_nodes={original!r} is neither a number nor 'least:most'")
        numbers = [int(piece) for piece in pieces]
        value = numbers[0] if len(numbers) == 1 else tuple(numbers)
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(n, int) for n in value):
        least, most = value
        if not 1 <= least <= most:
            raise InvalidRequest(f"num_nodes={original!r} must be 1 <= least <= most")
        return (least, most) if least != most else least
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"num_nodes={original!r} is not understood; it takes 1 or more")
    return value
