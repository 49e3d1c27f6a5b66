"""What a plugin declares: small frozen records, free of torch.

A spec names its implementation by a target, ``"package.module:attribute"``, so that listing and
choosing never imports a backend.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torchweft.errors import BrokenPlugin

__all__ = [
    "KINDS",
    "AcceleratorSpec",
    "Availability",
    "Detection",
    "LauncherSpec",
    "PrecisionSpec",
    "Preset",
    "Spec",
    "StrategySpec",
    "is_target",
    "load_target",
]

#: In the order in which they are chosen: a spec may only restrict itself to earlier kinds.
KINDS = ("accelerator", "strategy", "precision", "launcher")


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """What a probe found out, without initialising a device.

    Attributes:
        ok: whether it can be used here.
        reason: why not; one clause.
        hint: what to do about it; one clause.
        count: how many devices there are on this node; None where there is no limit.
    """

    ok: bool
    reason: str = ""
    hint: str = ""
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """What a launcher outside left in the environment.

    Attributes:
        reason: one clause, as in ``grid started this process``.
        world_size: processes in the whole run; None where the environment does not say.
        processes_per_node: processes on each node; None where the environment does not say.
        objection: why a run cannot be made of these processes, one clause with the way out; raised
            where this launcher is the one that counts. Empty: it can.
        processes_hint: what to write for ``{wanted}`` processes on each node, one clause such as
            ``write grid --tasks={wanted}``. For errors, as are those that follow.
        nodes_hint: what to write for ``{wanted}`` nodes.
        devices_hint: what to write so that each process sees ``{wanted}`` devices of its node.
    """

    reason: str
    world_size: int | None = None
    processes_per_node: int | None = None
    objection: str = ""
    processes_hint: str = ""
    nodes_hint: str = ""
    devices_hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A name for a strategy together with options, or with the launcher that it needs.

    Attributes:
        alias: what the user writes.
        options: arguments of the constructor that it stands for.
        launcher: name of the launcher that it needs; None: any.
    """

    alias: str
    # A mapping has no hash; the alias alone tells presets of one spec apart.
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    launcher: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What is common to the four kinds.

    Attributes:
        name: what the user writes.
        target: ``"package.module:attribute"`` of the class.
        summary: one line for ``torchweft plugins``.
        aliases: other names for the same thing.
        priority: what ``"auto"`` goes by; None is never picked by ``"auto"``.
        probe: target of a torch-free ``() -> Availability``; empty means always available.
        devices: torch device types served; empty means any.
        strategies: names of the strategies served; empty means any.
        exclusive: later kinds whose spec must name this one to be used with it.
    """

    kind: ClassVar[str] = ""

    name: str
    target: str
    summary: str = ""
    aliases: tuple[str, ...] = ()
    priority: int | None = None
    probe: str = ""
    devices: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    exclusive: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """Every word that a user may write for this spec, the name first."""
        return (self.name, *self.aliases)

    def preset(self, name: str) -> Preset | None:
        """The preset called ``name``, if ``name`` stands for more than this spec."""
        return None

    def served_devices(self) -> tuple[str, ...]:
        """The device types for which this spec competes; empty means any."""
        return self.devices

    def targets(self) -> dict[str, str]:
        """Every target of this spec by the name of its field; those left empty are left out."""
        return {"target": self.target, **({"probe": self.probe} if self.probe else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorSpec(Spec):
    """A kind of device.

    Attributes:
        device: torch's own word for it (``"cuda"``, ``"xla"``, ``"cpu"``).
        default_devices: how many ``devices="auto"`` takes; ``"all"`` takes what the probe counts.
        selectable: whether single devices may be chosen by index.
    """

    kind: ClassVar[str] = "accelerator"

    device: str
    default_devices: int | Literal["all"] = 1
    selectable: bool = True

    def served_devices(self) -> tuple[str, ...]:
        """Its own device: two accelerators of one name compete when they drive the same one."""
        return (self.device,)


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategySpec(Spec):
    """How work is spread over devices.

    Attributes:
        processes: one process per ``"device"``, per ``"node"``, or ``"one"`` in all.
        presets: names that stand for this strategy with options or a launcher.
        preload: modules worth importing once, before ranks are forked. None of them may select
            or count a device.
    """

    kind: ClassVar[str] = "strategy"

    processes: Literal["device", "node", "one"] = "device"
    presets: tuple[Preset, ...] = ()
    preload: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """Every word that a user may write for this spec: its name, aliases and presets."""
        return (self.name, *self.aliases, *(preset.alias for preset in self.presets))

    def preset(self, name: str) -> Preset | None:
        """The preset called ``name``, if ``name`` stands for options or a launcher too."""
        return next((preset for preset in self.presets if preset.alias == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionSpec(Spec):
    """Number formats of parameters and computation."""

    kind: ClassVar[str] = "precision"


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherSpec(Spec):
    """Who makes the processes.

    Attributes:
        detect: target of a torch-free ``(environ) -> Detection | None``: whether this launcher
            has already made the process that asks.
        processes: whether it serves plans of ``"one"`` process, of ``"many"``, or ``"any"``.
        nodes: whether it serves ``"one"`` node or ``"any"`` number.
        outside: the processes are made by somebody else, before this one ran its first line;
            such a launcher is detected, never asked to start anything.
        start: of one that is outside, the command that starts a script: ``srun python train.py``.
        function: whether ``launch()`` needs a function: ``"optional"`` or ``"required"``.
    """

    kind: ClassVar[str] = "launcher"

    detect: str = ""
    processes: Literal["one", "many", "any"] = "any"
    nodes: Literal["one", "any"] = "one"
    outside: bool = False
    start: str = ""
    function: Literal["optional", "required"] = "optional"

    def targets(self) -> dict[str, str]:
        """The targets of every spec, and that of the detection."""
        # Not super(): slots=True makes the class anew, and super() would look for the old one.
        return {**Spec.targets(self), **({"detect": self.detect} if self.detect else {})}


_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_target(text: str) -> bool:
    """Whether ``text`` is of the form ``"package.module:attribute"``; nothing is imported."""
    return _TARGET.fullmatch(text) is not None


def load_target(target: str, provider: str) -> Any:
    """The object that ``"package.module:attribute"`` names.

    ``provider`` says in the error who declared it. Raises ``BrokenPlugin``.
    """
    module_name, _, attribute = target.partition(":")
    if not is_target(target):
        raise BrokenPlugin(
            f"{provider} declares the target '{target}', which is not of the form "
            "'package.module:attribute'"
        )
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    # SystemExit too: a library that gives up by sys.exit() has not loaded either.
    except (Exception, SystemExit) as error:
        raise BrokenPlugin(
            f"{provider} declares the target '{target}', which cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return found
