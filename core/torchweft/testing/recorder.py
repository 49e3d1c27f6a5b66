"""Which hooks a ``Fabric`` calls, with what, and what each plugin answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torchweft import hookspecs
from torchweft.errors import InvalidRequest, did_you_mean
from torchweft.fabric import Fabric
from torchweft.manager import HookCall, Manager

__all__ = ["HookCall", "HookRecorder", "Recorded"]


class _Heard(list[HookCall]):
    """Calls of this process; a rank that is given the list in a pickle begins with an empty one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Heard, ()


@dataclass(kw_only=True)
class _Calls:
    calls: list[HookCall] = field(default_factory=_Heard)

    def of(self, hook: str | None = None, plugin: str | None = None) -> list[HookCall]:
        """The calls of one hook, of one plugin, or of one hook of one plugin.

        Raises ``InvalidRequest`` for a hook that does not exist, which is never called.
        """
        if hook is not None and hook not in hookspecs.__all__:
            raise InvalidRequest(
                f"no hook is called '{hook}', so that nothing calls it"
                f"{did_you_mean(hook, hookspecs.__all__)}"
            )
        return [
            call
            for call in self.calls
            if hook in (None, call.hook) and plugin in (None, call.plugin)
        ]


@dataclass(kw_only=True)
class Recorded(_Calls):
    """A ``Fabric`` and the hooks that it has called in this process.

    Attributes:
        fabric: made of what the recorder was given.
        calls: so far, in their order, from the loading of the installed plugins on. A module in
            ``plugins=`` is a plugin of the module's name.
    """

    fabric: Fabric


class HookRecorder(_Calls):
    """What the fixture ``hook_recorder`` is: it makes a ``Fabric`` and records its hook calls.

    ::

        def test_it_has_nothing_against_a_plan(hook_recorder):
            recorded = hook_recorder(my_hooks)
            [call] = recorded.of("torchweft_check_plan", plugin="my_hooks")
            assert call.arguments == {"plan": recorded.fabric.plan}
            assert call.result == []

        def test_it_objects_to_float16(hook_recorder):
            with pytest.raises(IncompatiblePlan):
                hook_recorder(my_hooks, precision="16-true")
            [call] = hook_recorder.of("torchweft_check_plan", plugin="my_hooks")
            assert call.result == ["write precision='bf16-true'"]

    Attributes:
        calls: of every ``Fabric`` that it was to make, in their order, also of one that could not
            be made.
    """

    def __call__(self, *modules: ModuleType, **fabric: Any) -> Recorded:
        """Make a ``Fabric`` with ``modules`` of hooks and its other arguments.

        The accelerator is ``"cpu"`` unless one is given. Raises what ``Fabric`` raises.
        """
        given = fabric.pop("plugins", None)
        plugins = [*modules, *(given if isinstance(given, list | tuple) else [given])]
        heard = _Heard()
        arguments = {"accelerator": "cpu", **fabric, "plugins": plugins}
        return Recorded(fabric=_Recording((heard, self.calls), arguments), calls=heard)


class _Recording(Fabric):
    """One whose plugins are listened to from their first call."""

    def __init__(self, heard: Iterable[list[HookCall]], arguments: Mapping[str, Any]) -> None:
        self._heard = tuple(heard)
        super().__init__(**arguments)

    def _load_plugins(self) -> Manager:
        manager = Manager.from_entry_points(os.environ, self._hear)
        for module in self._hooks:
            manager.add_module(module)
        return manager

    def _hear(self, call: HookCall) -> None:
        for heard in self._heard:
            heard.append(call)
