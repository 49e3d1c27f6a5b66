"""Which parameters a loss was computed from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["reached"]

T = TypeVar("T")


def reached(loss: Tensor, owners: Mapping[int, T]) -> list[T]:
    """Owners of parameters, by the id of each, to which gradients of ``loss`` come."""
    found: dict[int, T] = {}
    seen: set[Any] = set()
    work: list[Any] = [loss.grad_fn]
    while work:
        node = work.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # The last node on the way to a parameter has it.
        owner = owners.get(id(getattr(node, "variable", None)))
        if owner is not None:
            found[id(owner)] = owner
        work.extend(following for following, _ in node.next_functions)
    return list(found.values())
