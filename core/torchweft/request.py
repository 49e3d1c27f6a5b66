"""What the user asked for: the arguments of ``Fabric``, flags of the command, the environment."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal, TypeGuard

from torchweft.catalog import Catalog, Entry
from torchweft.errors import InvalidRequest
from torchweft.handoff import VARIABLE, Handoff
from torchweft.specs import KINDS

__all__ = ["Devices", "RunRequest", "parse_devices", "parse_name", "parse_num_nodes"]

#: A number of devices, chosen indices, all that there are, or None for the accelerator's default.
Devices = int | tuple[int, ...] | Literal["all"] | None

_LAUNCHER = "TORCHWEFT_LAUNCHER"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What was asked for. None means that it was left open.

    Attributes:
        accelerator: name.
        devices: per node; see ``parse_devices``.
        num_nodes: nodes; ``(least, most)`` when the run is elastic.
        strategy: name.
        precision: name.
        launcher: name.
        options: by kind, the options written behind a name (``"ddp:static_graph=true"``).
        sources: by field, the flag or variable that asked, where that was not the script.
    """

    accelerator: str | None = None
    devices: Devices = None
    num_nodes: int | tuple[int, int] | None = None
    strategy: str | None = None
    precision: str | None = None
    launcher: str | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def parse(
        cls,
        *,
        accelerator: Any = None,
        devices: Any = None,
        num_nodes: Any = None,
        strategy: Any = None,
        precision: Any = None,
        launcher: Any = None,
    ) -> RunRequest:
        """Build a request from values as a user writes them; checks form, not existence.

        Raises ``InvalidRequest``.
        """
        written = (accelerator, strategy, precision, launcher)
        parsed = {kind: parse_name(kind, value) for kind, value in zip(KINDS, written, strict=True)}
        names: dict[str, Any] = {kind: name for kind, (name, _) in parsed.items()}
        return cls(
            devices=parse_devices(devices),
            num_nodes=parse_num_nodes(num_nodes),
            options={kind: options for kind, (_, options) in parsed.items() if options},
            **names,
        )

    def with_environment(
        self, environ: Mapping[str, str], catalog: Catalog | None = None
    ) -> RunRequest:
        """Fill in what was left open from the flags of ``torchweft run`` and the environment.

        A flag and an argument that disagree are an error that names both. With a ``catalog``,
        two names of one thing agree: ``"gpu"`` and ``"cuda"``, or
        ``"ddp_find_unused_parameters_true"`` and ``"ddp:find_unused_parameters=true"``. Raises
        ``InvalidRequest``.
        """
        request = self
        handoff = Handoff.read(environ)
        if handoff is not None and handoff.flags:
            unknown = set(handoff.flags) - set(_FIELDS)
            if unknown:
                raise InvalidRequest(
                    f"the environment variable {VARIABLE} holds the flag '{min(unknown)}', which "
                    f"'torchweft run' does not hand on; unset {VARIABLE}"
                )
            flags = RunRequest.parse(**handoff.flags)
            spelled = {name: f"--{name.replace('_', '-')}" for name in _FIELDS}
            request = request._merge(replace(flags, sources=spelled), catalog)
        launcher = environ.get(_LAUNCHER)
        if launcher:
            try:
                wanted = RunRequest.parse(launcher=launcher)
            except InvalidRequest as error:
                raise InvalidRequest(f"the environment variable {_LAUNCHER}: {error}") from None
            request = request._merge(replace(wanted, sources={"launcher": _LAUNCHER}), catalog)
        return request

    def _merge(self, other: RunRequest, catalog: Catalog | None) -> RunRequest:
        merged = self
        for name in _FIELDS:
            theirs = getattr(other, name)
            mine = getattr(self, name)
            if theirs is None or (mine is not None and self._says_more(other, name, catalog)):
                continue
            if mine is not None and not other._says_more(self, name, catalog):
                raise InvalidRequest(
                    f"{other.sources[name]} says {other._spell(name)} and {self._said(name)}; "
                    "leave one of them out, or make them equal"
                )
            changed: dict[str, Any] = {name: theirs}
            merged = replace(
                merged,
                options=_with(merged.options, name, other.options.get(name)),
                sources=_with(merged.sources, name, other.sources[name]),
                **changed,
            )
        return merged

    def _says_more(self, other: RunRequest, name: str, catalog: Catalog | None) -> bool:
        """Whether whoever gets what this request says about ``name`` also gets the other's."""
        mine, theirs = getattr(self, name), getattr(other, name)
        my_options, their_options = self.options.get(name, {}), other.options.get(name, {})
        if mine == theirs and my_options == their_options:
            return True
        if catalog is None or name not in KINDS:
            return False
        entries, *rest = _meaning(name, mine, my_options, catalog)
        their_entries, *their_rest = _meaning(name, theirs, their_options, catalog)
        # "cuda" says more than "gpu", which may be another accelerator's alias as well.
        return bool(entries) and set(entries) <= set(their_entries) and rest == their_rest

    def _said(self, name: str) -> str:
        if name in self.sources:
            return f"{self.sources[name]} says {self._spell(name)}"
        return f"the script says Fabric({name}={self._spell(name)})"

    def _spell(self, name: str) -> str:
        value, options = getattr(self, name), self.options.get(name)
        if options:
            return repr(f"{value}:" + ",".join(f"{k}={v}" for k, v in options.items()))
        return repr(list(value)) if name == "devices" and isinstance(value, tuple) else repr(value)


#: What may be asked for, in the order in which it is compared.
_FIELDS = ("accelerator", "devices", "num_nodes", "strategy", "precision", "launcher")


def _with(mapping: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    rest = {k: v for k, v in mapping.items() if k != key}
    return {**rest, key: value} if value else rest


def _meaning(
    kind: str, name: str, options: Mapping[str, Any], catalog: Catalog
) -> tuple[tuple[Entry, ...], Mapping[str, Any], str | None]:
    """What a name stands for: entries, options, and a launcher where a preset names one."""
    entries = catalog.named(kind, name)
    presets = [preset for entry in entries if (preset := entry.spec.preset(name)) is not None]
    if not presets:
        return entries, options, None
    return entries, {**presets[0].options, **options}, presets[0].launcher


# -- names and options -----------------------------------------------------------------------


def parse_name(kind: str, value: Any) -> tuple[str | None, dict[str, Any]]:
    """Split ``"name:option=value,option=value"``; None and ``"auto"`` leave the choice open.

    Case does not matter in the name. Values are read as true, false, none, an int or a float
    where they look like one, and as text otherwise or between quotes. Raises ``InvalidRequest``.
    """
    if value is None:
        return None, {}
    if kind == "precision" and _is_int(value):
        value = str(value)
    if not isinstance(value, str):
        raise InvalidRequest(
            f"{kind}={value!r} is of type {type(value).__name__}; it takes a name, "
            f"or an instance of a {kind} class"
        )
    name, colon, rest = value.partition(":")
    name = name.strip().lower()
    if not name:
        raise InvalidRequest(f"{kind}={value!r} names nothing; it takes a name or 'auto'")
    if name == "auto":
        if colon:
            raise InvalidRequest(
                f"{kind}={value!r} gives options to a {kind} that is not named; options are "
                f"written behind a name"
            )
        return None, {}
    return name, _parse_options(kind, value, rest) if colon else {}


def _parse_options(kind: str, whole: str, rest: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in (piece.strip() for piece in rest.split(",")):
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
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


# -- devices and nodes -----------------------------------------------------------------------


def parse_devices(value: Any) -> Devices:
    """Read ``devices=``: a count, ``"auto"``, ``"all"`` or -1, indices as a list or ``"0,2"``.

    A string of digits is a count, as on a command line; ``"1,"`` is the device with index 1.
    Raises ``InvalidRequest``.
    """
    read = _read_device_text(value) if isinstance(value, str) else value
    if read is None:
        return None
    if isinstance(read, str) and read == "all":
        return "all"
    if _is_int(read):
        return _device_count(value, operator.index(read))
    if isinstance(read, Sequence) and not isinstance(read, str | bytes | bytearray):
        return _device_indices(value, read)
    raise InvalidRequest(
        f"devices={value!r} is not understood; it takes a number of devices, 'auto', "
        "'all', or a list of indices such as [0, 2] or '0,2'"
    )


def _read_device_text(text: str) -> Any:
    text = text.strip().lower()
    if text == "auto":
        return None
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    pieces = [piece.strip() for piece in text.removesuffix(",").split(",")]
    if "," in text and all(re.fullmatch(r"-?[0-9]+", piece) for piece in pieces):
        return [int(piece) for piece in pieces]
    return text


def _device_count(original: Any, count: int) -> Devices:
    if count == -1:
        return "all"
    if count < 1:
        raise InvalidRequest(
            f"devices={original!r} asks for {count} devices; it takes 1 or more, "
            "or -1 ('all') for all that an accelerator counts"
        )
    return count


def _device_indices(original: Any, value: Sequence[Any]) -> tuple[int, ...]:
    if not value or not all(_is_int(index) for index in value):
        raise InvalidRequest(
            f"devices={original!r} is not a list of device indices, such as [0, 2]"
        )
    indices = tuple(operator.index(index) for index in value)
    negative = [index for index in indices if index < 0]
    if negative:
        raise InvalidRequest(
            f"devices={original!r} has the negative index {negative[0]}; indices count from 0"
        )
    twice = [index for index in indices if indices.count(index) > 1]
    if twice:
        raise InvalidRequest(
            f"devices={original!r} names device {twice[0]} more than once; "
            "each process needs a device of its own"
        )
    return indices


def parse_num_nodes(value: Any) -> int | tuple[int, int] | None:
    """Read ``num_nodes=``: a count, or ``"least:most"`` or a pair for an elastic run.

    Raises ``InvalidRequest``.
    """
    read = _read_nodes_text(value) if isinstance(value, str) else value
    if read is None:
        return None
    pair = read if isinstance(read, list | tuple) else (read, read)
    if len(pair) != 2 or not all(_is_int(number) for number in pair):
        raise InvalidRequest(
            f"num_nodes={value!r} is not understood; it takes a number of nodes, 'auto', or "
            "'least:most' for an elastic run"
        )
    least, most = (operator.index(number) for number in pair)
    if not 1 <= least <= most:
        raise InvalidRequest(
            f"num_nodes={value!r} is impossible; it takes 1 or more"
            + (", the least number first" if least != most else "")
        )
    return (least, most) if least != most else least


def _read_nodes_text(text: str) -> Any:
    text = text.strip().lower()
    if text == "auto":
        return None
    pieces = [piece.strip() for piece in text.split(":")]
    if not all(re.fullmatch(r"[+-]?[0-9]+", piece) for piece in pieces):
        return text
    return int(text) if len(pieces) == 1 else [int(piece) for piece in pieces]


def _is_int(value: Any) -> TypeGuard[int]:
    """Whether a value counts something: an int of any library, but no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)
