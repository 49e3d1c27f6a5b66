"""A folder's checkpoint: what it holds, and its tensors as they are asked for."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchweft.api import FolderLayout, Foreign
from torchweft.api.state import unlike_shapes
from torchweft.checkpoint.file import first_line, identity, read
from torchweft.checkpoint.layouts import LaidOut
from torchweft.checkpoint.manifest import MANIFEST, VALUES, Manifest, check_no_part
from torchweft.checkpoint.metadata import METADATA, read_metadata
from torchweft.checkpoint.nesting import rebuilt
from torchweft.checkpoint.parts import stand_in
from torchweft.checkpoint.restoring import Source
from torchweft.checkpoint.shards import is_tensor, read_tensors, stored_parts
from torchweft.errors import CheckpointError, listed

__all__ = ["Folder"]


class Folder(Source):
    """Reads a tensor once it is known how it is to be split.

    Attributes:
        path: of the folder.
        manifest: None in a folder that torch.distributed.checkpoint wrote by itself.
        content: the whole structure, with tensors on the meta device for those that are stored.
    """

    def __init__(
        self, path: str, weights_only: bool = True, layout: FolderLayout | None = None
    ) -> None:
        self.path = path
        self._layout = layout
        self.manifest: Manifest | None = None
        self._metadata: Any = None
        self._stored: dict[str, list[Any]] | None = None
        self._identity = _identity(path)
        with self._unchanged():
            places = self._open(weights_only)
        self._entries = {
            id(value): entry for entry, value in _stand_ins(path, self.content, places)
        }

    def _open(self, weights_only: bool) -> list[Any]:
        """Read all but the tensors; returns where those belong."""
        if not os.path.exists(os.path.join(self.path, MANIFEST)):
            if self._layout is not None and (found := self._layout.find(self.path)) is not None:
                check_no_part(self.path)
                self.content = _content(self.path, self._layout, found)
                return []
            _check_foreign(self.path)
            self.content, places = self._foreign(weights_only)
            return places
        self.manifest = Manifest.read(self.path)
        values = read(os.path.join(self.path, VALUES), weights_only=weights_only)
        self.content, places = _checked(self.path, values)
        for name, pair in values.get("layouts", {}).items():
            for kind, place in zip(("model", "optimizer"), pair, strict=True):
                self._put(place, self._laid_out(kind, name))
        return places

    def _laid_out(self, kind: str, name: str) -> LaidOut:
        assert self.manifest is not None
        facts = self.manifest.layouts[name]
        return LaidOut(
            kind=kind,
            folder=os.path.join(self.path, name),
            layout=facts["layout"],
            strategy=facts.get("strategy", self.manifest.strategy),
            processes=self.manifest.world_size,
            facts=facts,
        )

    def _put(self, place: tuple[Any, ...], value: Any) -> None:
        """Into the content; containers on the way may be tuples, which are made anew."""

        def inside(container: Any, keys: tuple[Any, ...]) -> Any:
            if not keys:
                return value
            return rebuilt(
                container, lambda item, key: inside(item, keys[1:]) if key == keys[0] else item
            )

        self.content = inside(self.content, place)

    @property
    def metadata(self) -> Any:
        """Where the tensors are stored."""
        if self._metadata is None:
            with self._unchanged():
                self._metadata = read_metadata(self.path)
        return self._metadata

    # -- what others wrote -----------------------------------------------------------------------

    def _foreign(self, weights_only: bool) -> tuple[Any, list[Any]]:
        """The structure of a folder of torch's own, and where its tensors belong."""
        stored = self.metadata.state_dict_metadata
        places = dict(self.metadata.planner_data or {})
        flat = {
            entry: stand_in(described.size, described.properties.dtype)
            if is_tensor(described)
            else self._value(entry, weights_only)
            for entry, described in stored.items()
        }
        found = {entry: tuple(places.get(entry, (entry,))) for entry in flat}
        content: Any = {}
        for entry, value in flat.items():
            inside = content
            for key in found[entry][:-1]:
                inside = inside.setdefault(key, {})
            inside[found[entry][-1]] = value
        tensors = [entry for entry in flat if is_tensor(stored[entry])]
        return _with_lists(content), [(entry, found[entry]) for entry in tensors]

    def _value(self, entry: str, weights_only: bool) -> Any:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        info = self.metadata.storage_data[MetadataIndex(entry)]
        path = os.path.join(self.path, info.relative_path)
        try:
            with open(path, "rb") as file:
                file.seek(info.offset)
                data = io.BytesIO(file.read(info.length))
            return torch.load(data, map_location="cpu", weights_only=weights_only)
        except Exception as error:
            raise CheckpointError(
                f"'{entry}' cannot be read from '{path}': {first_line(error)}"
            ) from error

    # -- the tensors -----------------------------------------------------------------------------

    def whole(self, value: Any) -> Any:
        """``value`` with its tensors, whole and on the CPU."""
        targets: dict[str, Tensor] = {}
        shared: dict[Any, Tensor] = {}

        def target(item: Any, _: Any = None) -> Any:
            entry = self._entry(item)
            if entry is None:
                return rebuilt(item, target)
            # What is stored once is one tensor with several names.
            key = self.stored_at(item)
            if key not in shared:
                shared[key] = targets[entry] = torch.empty(item.shape, dtype=item.dtype)
            return shared[key]

        filled = target(value)
        self._read(targets)
        return filled

    def stored_at(self, tensor: Tensor) -> Any:
        """Where in the files it is."""
        entry = self._entry(tensor)
        if entry is None:
            return super().stored_at(tensor)
        if self._stored is None:
            self._stored = stored_parts(self.metadata)
        places = tuple((p.relative_path, p.offset) for *_, p in self._stored.get(entry, ()))
        return (places, tensor.shape, tensor.dtype) if places else entry

    def for_model(self, own: Callable[[], Iterable[tuple[str, Any]]], saved: Any) -> Any:
        """Tensors of the model's names are split as the model's own are."""
        mine = dict(own())
        targets: dict[str, Tensor] = {}
        filled: OrderedDict[str, Any] = OrderedDict()
        _check_shapes(saved, mine)
        for name, value in saved.items():
            entry = self._entry(value)
            like: Any = mine.get(name)
            if entry is not None and _is_target(like):
                value = targets[entry] = torch.empty_like(like)
            filled[name] = value
        self._read(targets)
        # What the model has under no such name it may convert by itself.
        state: Any = self.whole(filled)
        if hasattr(saved, "_metadata"):
            state._metadata = saved._metadata
        return state

    def for_optimizer(self, own: Callable[[], Mapping[Any, Tensor]], saved: Any) -> Any:
        """Tensors of a parameter's shape are split as the parameter is."""
        states = saved.get("state") if isinstance(saved, Mapping) else None
        if not isinstance(states, Mapping):
            return self.whole(saved)
        parameters = own()
        targets: dict[str, Tensor] = {}

        def of(parameter: Tensor) -> Callable[[Any, Any], Any]:
            def target(value: Any, _: Any) -> Any:
                entry = self._entry(value)
                if entry is None or value.shape != parameter.shape:
                    return value
                targets[entry] = torch.empty_like(parameter, dtype=value.dtype).detach()
                return targets[entry]

            return target

        filled = {
            key: rebuilt(held, of(parameters[key])) if key in parameters else held
            for key, held in _keyed_as(states, parameters)
            if key in parameters or not _is_parameter(key, saved)
        }
        self._read(targets)
        return self.whole({**saved, "state": filled})

    def _read(self, targets: Mapping[str, Tensor]) -> None:
        if targets:
            with self._unchanged():
                read_tensors(self.path, self.metadata, targets)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Raises ``CheckpointError`` when another checkpoint came in the place of this one."""
        try:
            yield
        finally:
            # Also where something else is the matter, which may be that two are mixed.
            if _identity(self.path) != self._identity:
                raise CheckpointError(
                    f"'{self.path}' was replaced while it was read; load it again"
                )

    def _entry(self, value: Any) -> str | None:
        return self._entries.get(id(value)) if isinstance(value, Tensor) else None


def _is_target(like: Any) -> bool:
    unmade = isinstance(like, nn.UninitializedParameter | nn.UninitializedBuffer)
    return isinstance(like, Tensor) and not unmade and not like.is_meta


def _is_parameter(key: Any, saved: Mapping[str, Any]) -> bool:
    """Whether state of that key belongs to a parameter, and not to the optimizer as a whole."""
    groups = saved.get("param_groups", ())
    return any(key in group.get("params", ()) for group in groups if isinstance(group, Mapping))


def _keyed_as(states: Mapping[Any, Any], parameters: Mapping[Any, Any]) -> Iterator[Any]:
    """torch's own folders have text for an optimizer's indices."""
    for key, held in states.items():
        known = key in parameters or not (isinstance(key, str) and key.isdecimal())
        yield (key if known else int(key)), held


def _check_shapes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Before anything is read; the words are those of a checkpoint of one file."""
    unlike = unlike_shapes(saved, {name: like for name, like in own.items() if _is_target(like)})
    if unlike:
        raise CheckpointError(unlike)


def _with_lists(value: Any) -> Any:
    """torch makes every key of a dict text, so that numbers are positions in a list."""
    if type(value) is not dict:
        return value
    items = {key: _with_lists(item) for key, item in value.items()}
    if items and all(isinstance(key, int) for key in items):
        return [items[key] for key in sorted(items)]
    return items


# -- opening -------------------------------------------------------------------------------------


def _content(path: str, layout: FolderLayout, found: Foreign) -> dict[str, Any]:
    """The structure of what a strategy's own library wrote."""
    both = {
        kind: LaidOut(
            kind=kind,
            folder=path,
            layout=layout.name,
            strategy=found.facts["strategy"],
            processes=found.processes,
            facts=found.facts,
        )
        for kind in ("model", "optimizer")
    }
    return {**found.rest, **both}


def _identity(path: str) -> Any:
    """What tells a folder's checkpoint from another one in its place."""
    return [identity(os.path.join(path, name)) for name in (MANIFEST, METADATA)]


def _checked(path: str, values: Any) -> tuple[Any, list[Any]]:
    if not isinstance(values, dict) or not {"content", "places"} <= set(values):
        raise CheckpointError(f"'{os.path.join(path, VALUES)}' is not what torchweft writes")
    return values["content"], values["places"]


def _stand_ins(path: str, content: Any, places: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    for entry, place in places:
        value = content
        try:
            for key in place:
                value = value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"'{os.path.join(path, VALUES)}' has no place for the tensor '{entry}'"
            ) from error
        yield entry, value


def _check_foreign(path: str) -> None:
    """Raise ``CheckpointError`` for a folder that is no checkpoint of torch's own either."""
    try:
        names = set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be listed: {error.strerror}") from error
    if METADATA in names and VALUES not in names:
        return
    if VALUES in names or any(name.endswith(".distcp") for name in names):
        missing = MANIFEST if VALUES in names else METADATA
        raise CheckpointError(
            f"'{path}' is half a checkpoint: it has no '{missing}', which is written last; copy "
            "the folder again as a whole, or load another one"
        )
    below = sorted(n for n in names if os.path.exists(os.path.join(path, n, MANIFEST)))
    if below:
        shown = listed([repr(os.path.join(path, name)) for name in below])
        raise CheckpointError(
            f"'{path}' is a folder with checkpoints in it, not one itself; it holds {shown}"
        )
    check_no_part(path)
    read(path)  # its words for a folder of another kind
