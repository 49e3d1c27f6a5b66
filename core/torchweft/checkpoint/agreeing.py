"""What the ranks give to be saved, compared before any of them waits for another's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchweft.checkpoint.nesting import is_sharded
from torchweft.checkpoint.parts import stand_in
from torchweft.checkpoint.ranks import Ranks
from torchweft.checkpoint.state import Filter, Taken, check_request, taken
from torchweft.errors import CheckpointError, listed
from torchweft.wrappers import FabricModule, FabricOptimizer

__all__ = ["agreed"]


@dataclass(frozen=True, slots=True)
class _Given:
    """What one rank gave.

    Attributes:
        parts: by key, in order, what all ranks together make a checkpoint of: place and kind.
        filters: keys for which there is one.
    """

    parts: dict[Any, list[tuple[str, str]]]
    filters: list[Any]


def agreed(
    ranks: Ranks, state: Mapping[str, Any], filter: Mapping[str, Filter] | None
) -> tuple[dict[str, Any], dict[str, Filter]]:
    """The state that this rank has under rank 0's keys, in their order, and filters as rank 0's.

    Models and optimizers that were set up, and sharded tensors, have to be in the state of every
    rank. Of everything else rank 0's is written, so that what others have, and whether, is their
    own affair; under a key that they do not have they get None. Objects that were not set up are
    asked for their state.

    Raises:
        InvalidRequest: in every rank, when ``state`` or ``filter`` of one is not of the form.
        CheckpointError: in every rank, when they do not agree, or an object has no state to save.
    """
    mine: dict[str, Any] = {}
    filters: dict[str, Filter] = {}

    def look() -> _Given:
        filters.update(check_request(state, filter))
        mine.update((key, taken(value)) for key, value in state.items())
        parts = {key: list(_parts(value, f"state[{key!r}]")) for key, value in mine.items()}
        return _Given(parts, list(filters))

    given = ranks.all(look)
    difference = _missing(given) or _order(given)
    if difference:
        raise CheckpointError(
            f"{difference}; every rank has to give the same models, optimizers and sharded "
            "tensors, in the same order, while of other values rank 0's are written"
        )
    chosen = {
        key: filters.get(key, _everything)
        if all(key in each.filters for each in given)
        else _unread(filters.get(key, _everything))
        for key in given[0].filters
    }
    return {key: mine.get(key) for key in given[0].parts}, chosen


def _parts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, FabricModule):
        yield path, "a model"
    elif isinstance(value, FabricOptimizer):
        yield path, "an optimizer"
    elif is_sharded(value):
        yield path, "a sharded tensor"
    elif isinstance(value, Taken):
        yield from _parts(value.state, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _parts(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _parts(item, f"{path}[{index}]")


def _missing(given: Sequence[_Given]) -> str:
    """Which parts only some of the ranks have."""
    holders: dict[tuple[str, str], list[int]] = {}
    for rank, each in enumerate(given):
        for parts in each.parts.values():
            for part in parts:
                holders.setdefault(part, []).append(rank)
    return listed(
        [
            f"only {_named(having)} {'has' if len(having) == 1 else 'have'} {place}, {kind}"
            for (place, kind), having in holders.items()
            if len(having) < len(given)
        ]
    )


def _order(given: Sequence[_Given]) -> str:
    """Which parts, all ranks having them, come in another order than rank 0's."""
    for key, parts in given[0].parts.items():
        unlike = [rank for rank, each in enumerate(given) if each.parts.get(key, []) != parts]
        if unlike:
            return f"what is in state[{key!r}] comes in another order in {_named(unlike)}"
    return ""


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed([str(rank) for rank in ranks])}"


def _everything(name: str, value: Any) -> bool:
    return True


def _unread(keep: Filter) -> Filter:
    """A filter that not all ranks have, which cannot wait for the others' parts of a tensor."""

    def kept(name: str, value: Any) -> bool:
        return keep(name, stand_in(value.shape, value.dtype) if is_sharded(value) else value)

    return kept
