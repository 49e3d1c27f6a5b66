"""Models and optimizers that a strategy writes to a folder in a layout of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchweft.api import Strategy
from torchweft.api.folder import FolderLayout
from torchweft.checkpoint.ranks import Ranks
from torchweft.errors import CheckpointError
from torchweft.wrappers import FabricModule, FabricOptimizer

__all__ = ["LaidOut", "Pair", "find_pairs", "laid_out_in", "load_pair", "write_pairs"]

#: The keys that lead to a value in nested dicts, lists and tuples.
Place = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A model and its optimizer, and where in the state they are."""

    layout: FolderLayout
    module: FabricModule
    optimizer: FabricOptimizer
    places: tuple[Place, Place]
    folder: str


@dataclass(frozen=True, slots=True)
class LaidOut:
    """What is in the place of a model or an optimizer that only its strategy reads.

    Attributes:
        kind: ``"model"`` or ``"optimizer"``.
        folder: with the files of both.
        layout: its name.
        strategy: what to ask a Fabric for to read it.
        processes: that wrote it.
        facts: what the layout said of it.
    """

    kind: str
    folder: str
    layout: str
    strategy: str
    processes: int
    facts: Mapping[str, Any]

    def __str__(self) -> str:
        number = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"layout '{self.layout}', read by strategy '{self.strategy}' in {number}"

    @property
    def way_out(self) -> str:
        """How it becomes what every strategy reads."""
        number = "1 device" if self.processes == 1 else f"{self.processes} devices"
        return (
            f"load it with strategy '{self.strategy}' on {number} and save it to a path with a "
            "suffix, such as 'x.ckpt', which every strategy reads on any number of devices"
        )


# -- writing ---------------------------------------------------------------------------------------


def find_pairs(strategy: Strategy, state: Mapping[str, Any]) -> list[Pair]:
    """Models of ``state`` whose optimizer is in it too, which the strategy writes its own way."""
    layout = strategy.folder_layout
    if layout is None:
        return []
    found = list(_walk(state, ()))
    modules: dict[int, tuple[Place, FabricModule]] = {}
    for place, each in found:
        if isinstance(each, FabricModule):
            modules.setdefault(id(each.prepared), (place, each))
    pairs: list[Pair] = []
    for place, each in found:
        if not isinstance(each, FabricOptimizer) or len(each.modules) != 1:
            continue
        # Taken away, so that what is in the state twice is written in the layout once.
        of = modules.get(id(each.modules[0]))
        if of is None or not layout.takes(of[1].prepared, each.optimizer):
            continue
        del modules[id(each.modules[0])]
        name = _folder_name(of[0], {pair.folder for pair in pairs})
        pairs.append(Pair(layout, of[1], each, (of[0], place), name))
    return pairs


def _walk(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, FabricModule | FabricOptimizer):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*place, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, (*place, index))


def _folder_name(place: Place, taken: set[str]) -> str:
    """That of the model's place, which may hold anything."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", ".".join(map(str, place))) or "_"
    while name in taken:
        name += "_"
    return name


def write_pairs(ranks: Ranks, folder: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Each into a folder of its own; returns what to keep of them, by folder.

    Raises ``CheckpointError`` in every rank when one failed.
    """
    kept = {}
    for pair in pairs:
        kept[pair.folder] = {"layout": pair.layout.name, **_write(ranks, folder, pair)}
    return kept


def _write(ranks: Ranks, folder: str, pair: Pair) -> dict[str, Any]:
    path = os.path.join(folder, pair.folder)
    ranks.first(lambda: os.mkdir(path))
    module, optimizer = pair.module.prepared, pair.optimizer.optimizer
    return ranks.all(lambda: pair.layout.save(path, module, optimizer))[0]


# -- reading ---------------------------------------------------------------------------------------


def load_pair(
    strategy: Strategy,
    found: LaidOut,
    module: tuple[Any, str] | None,
    optimizer: tuple[Any, str] | None,
) -> None:
    """Fill a model, and its optimizer unless None; each with its place in words.

    Raises ``CheckpointError`` for what cannot be filled this way.
    """
    layout = strategy.folder_layout
    place = module or optimizer
    assert place is not None
    if layout is None or layout.name != found.layout:
        raise CheckpointError(
            f"{place[1]} is in the checkpoint in the layout '{found.layout}' of strategy "
            f"'{found.strategy}', which this run's strategy does not read; {found.way_out}"
        )
    if module is None:
        raise CheckpointError(
            f"{place[1]} is in the checkpoint in the layout '{found.layout}', together with its "
            "model; load both: fabric.load(path, {'model': model, 'optimizer': optimizer})"
        )
    if not isinstance(module[0], FabricModule):
        raise CheckpointError(
            f"{module[1]} is in the checkpoint in the layout '{found.layout}', which fills models "
            f"that were set up, and the {type(module[0]).__name__} was not; call fabric.setup() "
            "before fabric.load()"
        )
    stepped = None
    if optimizer is not None:
        of: list[Any] = getattr(optimizer[0], "modules", [])
        if not isinstance(optimizer[0], FabricOptimizer) or not _same(of, module[0].prepared):
            raise CheckpointError(
                f"{optimizer[1]} is in the checkpoint as the optimizer of {module[1]}, and was not "
                "set up with it here; call model, optimizer = fabric.setup(model, optimizer)"
            )
        stepped = optimizer[0].optimizer
    layout.check(found.facts, module[0].prepared, stepped)
    layout.load(found.folder, module[0].prepared, stepped)


def _same(modules: Sequence[Any], module: Any) -> bool:
    return len(modules) == 1 and modules[0] is module


def laid_out_in(value: Any) -> Iterator[LaidOut]:
    """Everything of that kind in nested containers."""
    if isinstance(value, LaidOut):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from laid_out_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from laid_out_in(item)
