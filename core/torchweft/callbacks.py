"""Callbacks: any objects, whose methods are called by the name of a hook."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torchweft.errors import InvalidRequest

__all__ = ["Callbacks"]


class Callbacks:
    """The callbacks of a Fabric, in their order.

    A callback takes part in a hook by having a method of its name. It is passed those keyword
    arguments that the method names, or all of them if it has ``**kwargs``, so that a hook can be
    called with more than a callback wants to know. Positional arguments are passed as they are.
    """

    def __init__(self, callbacks: Iterable[Any] = ()) -> None:
        self._callbacks = tuple(callbacks)
        self._accepted: dict[tuple[int, str], tuple[Any, frozenset[str] | None]] = {}

    def __iter__(self) -> Iterator[Any]:
        return iter(self._callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)

    def call(self, hook: str, /, *args: Any, **kwargs: Any) -> None:
        """Call the method of that name on every callback that has one.

        Raises ``InvalidRequest`` where an attribute of that name cannot be called.
        """
        for index, callback in enumerate(self._callbacks):
            method = _method(callback, hook)
            if method is None:
                continue
            accepted = self._accepted_by(index, hook, method) if kwargs else None
            if accepted is None:
                method(*args, **kwargs)
            else:
                method(*args, **{name: kwargs[name] for name in kwargs if name in accepted})

    def listens(self, hook: str) -> bool:
        """Whether any callback has a method of that name; raises as ``call`` does."""
        # Every one is looked at, so that a wrong one is found before the first step.
        methods = [_method(callback, hook) for callback in self._callbacks]
        return any(method is not None for method in methods)

    def _accepted_by(self, index: int, hook: str, method: Any) -> frozenset[str] | None:
        """The keyword arguments that it takes; None: all. The signature is looked at once."""
        known = self._accepted.get((index, hook))
        # A callback may replace its method while the run goes on.
        if known is None or known[0] != method:
            known = self._accepted[index, hook] = (method, _keywords_of(method))
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_callbacks": self._callbacks, "_accepted": {}}


def _method(callback: Any, hook: str) -> Callable[..., Any] | None:
    method = getattr(callback, hook, None)
    if method is not None and not callable(method):
        raise InvalidRequest(
            f"fabric.call('{hook}'): attribute '{hook}' of {type(callback).__name__} is a "
            f"{type(method).__name__}, not a method"
        )
    return method


def _keywords_of(method: Callable[..., Any]) -> frozenset[str] | None:
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # a callable of C has no signature to look at
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    )
