"""Moving and converting nested batches."""

from __future__ import annotations

import collections
import dataclasses
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from torchweft.api import map_leaves, move_batch
from torchweft.api.batch import mover

CPU = torch.device("cpu")
# A device that every torch has, and whose tensors say where they are.
META = torch.device("meta")


class Pair(NamedTuple):
    first: Any
    to: Any  # a field of this name is no method


@dataclasses.dataclass
class Sample:
    image: Any
    label: Any = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: Any
    size: int = dataclasses.field(init=False, default=7)
    later: Any = dataclasses.field(init=False)


@dataclasses.dataclass(slots=True)
class Slotted:
    image: Any


class Encoding(collections.UserDict):
    """What a tokenizer returns: a mapping whose other attributes a constructor would lose."""

    def __init__(self, data, encodings):
        super().__init__(data)
        self.encodings = encodings


class MovingEncoding(Encoding):
    def to(self, device):
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Graph:
    """Moves itself in place and returns nothing."""

    def __init__(self):
        self.x = torch.ones(2)

    def to(self, device):
        self.x = self.x.to(device)


class Boxes:
    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        return Boxes(self.tensor.to(device))


class Named(dict):
    """A mapping with attribute access and a constructor that takes something else."""

    def __init__(self, name):
        super().__init__()
        self.name = name


class Rows(list):
    def __init__(self, *, title):
        super().__init__()
        self.title = title


class ReadOnly(collections.abc.Mapping):
    def __init__(self, items):
        self._items = dict(items)

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Store(collections.abc.MutableMapping):
    """A mutable mapping whose ``copy.copy`` would share its storage."""

    def __init__(self, path, items):
        self.path, self.items_ = path, items

    def copy(self):
        return Store(self.path, dict(self.items_))

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


def tensor():
    return torch.arange(3.0)


def on_meta(value):
    return isinstance(value, torch.Tensor) and value.device == META


class TestMove:
    def test_nested_collections(self):
        batch = {"x": [tensor(), (tensor(), 3)], "y": ("text", None, {"z": tensor()}), "n": 1.5}
        moved = move_batch(batch, META)
        assert on_meta(moved["x"][0])
        assert on_meta(moved["x"][1][0])
        assert on_meta(moved["y"][2]["z"])
        assert moved["x"][1][1] == 3
        assert moved["y"][:2] == ("text", None)
        assert moved["n"] == 1.5
        assert list(moved) == ["x", "y", "n"]
        assert type(moved["x"]) is list
        assert type(moved["x"][1]) is tuple

    def test_the_given_batch_is_not_changed(self):
        inner, given = [tensor()], {"a": tensor()}
        batch = [given, inner, (tensor(),)]
        before = list(batch)
        move_batch(batch, META)
        assert batch == before
        assert given["a"].device == CPU
        assert inner[0].device == CPU

    @pytest.mark.parametrize(
        "batch",
        [
            tensor(),
            [tensor(), tensor()],
            (tensor(), [tensor()]),
            {"a": tensor(), "b": {"c": (tensor(),)}},
            Pair(tensor(), 1),
            Sample(tensor(), [tensor()]),
            Encoding({"ids": tensor()}, encodings=[1]),
            ReadOnly({"a": tensor()}),
            collections.OrderedDict(a=tensor()),
            "text",
            3,
            None,
            b"bytes",
            torch.Size([2, 3]),
            range(3),
            {"a"},
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_is_there_already_is_returned_as_it_is(self, batch):
        assert move_batch(batch, CPU) is batch

    def test_a_named_tuple_keeps_its_class_and_a_field_called_to(self):
        moved = move_batch(Pair(tensor(), tensor()), META)
        assert type(moved) is Pair
        assert on_meta(moved.first)
        assert on_meta(moved.to)

    def test_a_result_tuple_of_torch(self):
        moved = move_batch(torch.ones(2, 3).max(dim=1), META)
        assert type(moved) is torch.return_types.max
        assert on_meta(moved.values)
        assert on_meta(moved.indices)

    def test_dataclasses(self):
        moved = move_batch(Sample(tensor(), (tensor(),), "note"), META)
        assert type(moved) is Sample
        assert on_meta(moved.image)
        assert on_meta(moved.label[0])
        assert moved.note == "note"

    def test_a_frozen_dataclass_with_fields_that_its_constructor_does_not_take(self):
        moved = move_batch(Frozen(tensor()), META)
        assert on_meta(moved.image)
        assert moved.size == 7
        assert not hasattr(moved, "later")

    def test_a_dataclass_with_slots(self):
        given = Slotted(tensor())
        assert on_meta(move_batch(given, META).image)
        assert given.image.device == CPU

    def test_a_dataclass_itself_is_left_alone(self):
        assert move_batch([Sample, tensor()], META)[0] is Sample

    def test_a_mapping_keeps_what_its_constructor_would_ask_for(self):
        given = Encoding({"ids": tensor(), "text": "words"}, encodings=["spans"])
        moved = move_batch(given, META)
        assert type(moved) is Encoding
        assert on_meta(moved["ids"])
        assert moved["text"] == "words"
        assert moved.encodings == ["spans"]
        assert given["ids"].device == CPU

    def test_a_mapping_that_moves_itself_is_asked_to(self):
        given = MovingEncoding({"ids": tensor()}, encodings=[])
        assert move_batch([given], META)[0] is given
        assert on_meta(given["ids"])

    def test_a_default_dict_keeps_its_factory(self):
        given = collections.defaultdict(list, a=tensor())
        moved = move_batch(given, META)
        assert on_meta(moved["a"])
        assert moved["b"] == []
        assert given["a"].device == CPU

    def test_a_dict_with_a_constructor_of_its_own(self):
        given = Named("train")
        given["a"] = tensor()
        moved = move_batch(given, META)
        assert type(moved) is Named
        assert moved.name == "train"
        assert on_meta(moved["a"])
        assert given["a"].device == CPU

    def test_a_key_called_to_is_no_method(self):
        class Attributes(dict):
            __getattr__ = dict.__getitem__

        given = Attributes(to=tensor())
        assert on_meta(move_batch(given, META)["to"])

    def test_a_list_with_a_constructor_of_its_own(self):
        given = Rows(title="rows")
        given.append(tensor())
        moved = move_batch(given, META)
        assert type(moved) is Rows
        assert moved.title == "rows"
        assert on_meta(moved[0])
        assert given[0].device == CPU

    def test_mappings_that_cannot_be_written(self):
        assert on_meta(move_batch(ReadOnly({"a": tensor()}), META)["a"])
        moved = move_batch(MappingProxyType({"a": tensor()}), META)
        assert type(moved) is MappingProxyType
        assert on_meta(moved["a"])

    def test_a_mapping_that_shares_its_storage_when_copied_by_force(self):
        given = Store("disk", {"a": tensor()})
        moved = move_batch(given, META)
        assert moved.path == "disk"
        assert on_meta(moved["a"])
        assert given["a"].device == CPU

    def test_objects_that_move(self):
        graph, boxes = Graph(), Boxes(tensor())
        moved = move_batch((graph, boxes), META)
        assert moved[0] is graph
        assert on_meta(graph.x)
        assert moved[1] is not boxes
        assert on_meta(moved[1].tensor)

    def test_a_packed_sequence_keeps_its_lengths_on_the_host(self):
        packed = pack_padded_sequence(torch.ones(2, 3, 1), torch.tensor([3, 2]), batch_first=True)
        moved = move_batch(packed, META)
        assert on_meta(moved.data)
        assert moved.batch_sizes.device == CPU

    def test_objects_without_to_and_classes_are_left_alone(self):
        class Plain:
            to = "not a method"

        plain = Plain()
        batch = [plain, Boxes, {1, 2}]
        assert move_batch(batch, META) is batch

    def test_parameters_and_other_subclasses_of_tensor(self):
        parameter = nn.Parameter(tensor())
        assert move_batch(parameter, CPU) is parameter
        assert on_meta(move_batch([parameter], META)[0])

    def test_sparse_and_nested_tensors(self):
        sparse = torch.eye(3).to_sparse()
        jagged = torch.nested.nested_tensor([tensor(), tensor()[:2]], layout=torch.jagged)
        moved = move_batch([sparse, jagged], META)
        assert moved[0].device == META
        assert moved[1].device == META

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU")
    def test_pinned_memory_reaches_a_gpu(self):
        device = torch.device("cuda", 0)
        pinned = torch.arange(1000).pin_memory()
        moved = move_batch({"x": pinned, "y": (tensor(),)}, device)
        assert moved["x"].device == device
        assert torch.equal(moved["x"].cpu(), pinned)
        assert torch.equal(moved["y"][0].cpu(), tensor())


leaves = st.one_of(st.integers(), st.text(max_size=3), st.none(), st.builds(tensor))
batches = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Sample, inner, inner),
        st.dictionaries(st.text(max_size=2), inner, max_size=2).map(collections.UserDict),
    ),
    max_leaves=12,
)


def flat(data):
    """Every leaf with the classes around it, by a walk that knows the test's classes only."""
    if isinstance(data, dict | collections.UserDict):
        return [type(data), *((key, flat(value)) for key, value in data.items())]
    if isinstance(data, list | tuple):
        return [type(data), *(flat(item) for item in data)]
    if isinstance(data, Sample):
        return [Sample, flat(data.image), flat(data.label), data.note]
    return data.device if isinstance(data, torch.Tensor) else data


def expected(flattened, device):
    if isinstance(flattened, list | tuple):
        return type(flattened)(expected(item, device) for item in flattened)
    return device if isinstance(flattened, torch.device) else flattened


@given(batches)
def test_any_nesting_moves_and_keeps_its_shape(batch):
    before = flat(batch)
    moved = move_batch(batch, META)
    assert flat(moved) == expected(before, META)
    assert flat(batch) == before
    assert move_batch(moved, META) is moved


@given(batches)
def test_any_nesting_is_mapped_leaf_by_leaf(batch):
    before = flat(batch)
    mapped = map_leaves(batch, lambda leaf: leaf.to(META))
    assert flat(mapped) == expected(before, META)
    assert flat(batch) == before
    assert map_leaves(mapped, lambda leaf: leaf) is mapped


class TestMapLeaves:
    def test_collections_that_move_themselves_are_walked_all_the_same(self):
        given = MovingEncoding({"ids": tensor()}, encodings=[1])
        mapped = map_leaves([given], lambda leaf: leaf.double())[0]
        assert mapped["ids"].dtype == torch.float64
        assert mapped.encodings == [1]
        assert given["ids"].dtype == torch.float32

    def test_other_objects_are_leaves_and_plain_values_are_not_asked(self):
        box = Boxes(tensor())
        asked = []
        map_leaves([box, 1, "a", None, 2.0, True, b"", Boxes], lambda leaf: asked.append(leaf))
        assert asked == [box, Boxes]

    def test_subclasses_of_numbers_and_strings_are_plain(self):
        class Word(str):
            __slots__ = ()

        batch = [Word("a"), torch.Size([1])]
        assert map_leaves(batch, lambda leaf: pytest.fail("not a leaf")) is batch


# -- settled once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("only_place", [True, False])
def test_a_mover_does_what_move_batch_does(monkeypatch, only_place):
    there_is = None if only_place else torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: there_is)
    move = mover(CPU, on_host=True)
    tensor = torch.ones(2)
    for batch in (
        tensor,
        7,
        [tensor, (tensor, "a", {"x": [tensor, None]})],
        {"x": {"y": (tensor, 1.5)}},
        (),
        Pair(tensor, [tensor]),
        [Sample(tensor)],
        Named("x"),
    ):
        assert move(batch) is batch
    # Whatever moves itself is asked to.
    graph, boxes = Graph(), Boxes(tensor)
    batch = [tensor, {"graph": graph, "boxes": (boxes, 1)}]
    moved = move(batch)
    assert moved[0] is tensor
    assert moved[1]["graph"] is graph
    assert type(moved[1]["boxes"][0]) is Boxes
    assert moved[1]["boxes"][0] is not boxes
    assert batch[1]["boxes"][0] is boxes


@pytest.mark.parametrize("on_host", [True, False])
def test_a_mover_to_another_place(monkeypatch, on_host):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: META)
    batch = {"x": [torch.ones(2)], "y": 1}
    moved = mover(META, on_host=on_host)(batch)
    assert moved["x"][0].is_meta
    assert moved["y"] == 1
