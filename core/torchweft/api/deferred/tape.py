"""What was done to tensors that have no memory, in order, to be done again where they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from torchweft.api.initialising import default_dtype

__all__ = [
    "DRAWING",
    "META",
    "Memory",
    "Tape",
    "View",
    "name_of",
    "on_meta",
    "tensors_in",
    "written_by",
]

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a part of a storage, which is what tensors that share memory have in common."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    conj: bool
    neg: bool

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        """``tensor`` as it is now."""
        return cls(
            tensor.untyped_storage()._cdata,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )


@dataclass(slots=True)
class _Operation:
    """One call on the tape. Tensors are views of storages, real ones are themselves."""

    call: Callable[..., Any]
    args: Any
    kwargs: Any
    outs: list[View | None]
    default: torch.dtype
    random: bool
    #: The storages whose former values it needs, and the operations that left them there.
    reads: dict[int, int]
    writes: set[int]
    #: Those of the written storages that are overwritten from end to end.
    whole: set[int]
    drawn: bool = field(default=False)

    def run(self, memory: Memory) -> None:
        def real(value: Any) -> Any:
            if isinstance(value, View):
                return memory.tensor(value)
            return memory.device if value == META else value

        with torch.no_grad(), default_dtype(self.default):
            args, kwargs = tree_map(real, (self.args, self.kwargs))
            outs = tensors_in(self.call(*args, **kwargs))
            for view, out in zip(self.outs, outs, strict=True):
                if view is not None:
                    memory.take(view, out)

    @property
    def inputs(self) -> list[int]:
        """Operations whose results decide what is drawn."""
        return [index for storage, index in self.reads.items() if storage not in self.writes]


class Memory:
    """Real storages in the places of recorded ones."""

    def __init__(self, device: torch.device, sizes: Mapping[int, int]) -> None:
        self.device = device
        self._sizes = sizes
        self._storages: dict[int, torch.UntypedStorage] = {}

    def tensor(self, view: View) -> Tensor:
        """A view of it, of memory that is taken now where there is none."""
        storage = self._storages.get(view.storage)
        if storage is None:
            storage = torch.UntypedStorage(self._sizes[view.storage], device=self.device)  # type: ignore[no-untyped-call]
            self._storages[view.storage] = storage
        tensor = torch.empty(0, dtype=view.dtype, device=self.device)
        tensor.set_(storage, view.offset, view.size, view.stride)
        tensor = torch._neg_view(tensor) if view.neg else tensor
        return torch.conj(tensor) if view.conj else tensor

    def take(self, view: View, out: Tensor) -> None:
        """Make the memory of a result that of a view."""
        # A kernel may lay its result out in another way than the one for the meta device.
        if (view.stride, view.offset) != (out.stride(), out.storage_offset()):
            self.tensor(view).copy_(out)
        else:
            self._storages[view.storage] = out.untyped_storage()

    def drop(self, storages: Iterable[int]) -> None:
        """Free memory."""
        for storage in storages:
            self._storages.pop(storage, None)


class Tape:
    """Operations in their order, and which of them left each storage as it is."""

    def __init__(self) -> None:
        self._operations: dict[int, _Operation] = {}
        self._count = 0
        self._last: dict[int, int] = {}
        self._touched: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        # Weak, so that what nobody holds any more can be forgotten; the address of a storage is
        # not given away again as long as there is one of these.
        self._storages: dict[int, StorageWeakRef] = {}

    def knows(self, tensor: Tensor) -> bool:
        """Whether it holds what becomes of the tensor."""
        return on_meta(tensor) and tensor.untyped_storage()._cdata in self._last

    def note(
        self,
        call: Any,
        args: Any,
        kwargs: Any,
        before: Mapping[int, View],
        written: list[Tensor],
        out: Any,
        own: bool = False,
    ) -> None:
        """Add a call that was made, unless all it did was to look at tensors in another way."""
        outs = tensors_in(out)
        touched = {view.storage for view in before.values()}
        new = {t.untyped_storage()._cdata: t for t in outs if on_meta(t)}
        for storage in touched:
            new.pop(storage, None)
        writes = {*new, *(before[id(tensor)].storage for tensor in written)}
        if not writes:
            return
        whole = {*new, *_overwritten(call, before, written)}
        reads = touched - whole
        random = torch.Tag.nondeterministic_seeded in getattr(call, "tags", _RANDOM)

        def kept(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return before.get(id(value)) or (value if own else value.detach().clone())

        for tensor in (*new.values(), *written, *tensors_in((args, kwargs))):
            if on_meta(tensor):
                self._touch(tensor)
        known = all(storage in self._last for storage in reads)
        if known or random:
            args, kwargs = tree_map(kept, (args, kwargs))
            self._operations[self._count] = _Operation(
                call,
                args,
                kwargs,
                [View.of(t) if t.untyped_storage()._cdata in new else None for t in outs],
                torch.get_default_dtype(),
                random,
                {storage: self._last[storage] for storage in reads if storage in self._last},
                writes,
                whole,
            )
        for storage in writes:
            # What hangs on a tensor that was made on the meta device elsewhere has no values.
            if known:
                self._last[storage] = self._count
            else:
                self._last.pop(storage, None)
        self._count += 1

    def _touch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._touched[key] = self._count
        self._sizes[key] = max(self._sizes.get(key, 0), storage.nbytes())

    def replay(
        self,
        wanted: list[int],
        device: torch.device,
        deliver: Callable[[int, Memory], None],
        draws: bool,
    ) -> None:
        """Do again what the wanted storages come from, in order; each delivered when complete.

        ``draws``: with the random numbers that are due by then, whatever became of them.
        """
        live = self._needed(self._last[storage] for storage in wanted)
        drawn = self._undrawn(self._end(wanted)) if draws else []
        live |= self._needed(index for each in drawn for index in self._operations[each].inputs)
        order = sorted(live.union(drawn))
        dead = self._dead(order, live)
        due: dict[int, list[int]] = {}
        for storage in wanted:
            due.setdefault(self._last[storage], []).append(storage)
        memory = Memory(device, self._sizes)
        for index in order:
            operation = self._operations[index]
            operation.run(memory)
            operation.drawn |= draws
            for storage in due.get(index, ()):
                deliver(storage, memory)
            memory.drop(dead[index])

    def _end(self, wanted: list[int]) -> int:
        """The last operation before those on what is not wanted and still lives."""
        end = max(self._touched[storage] for storage in wanted)
        others = self._last.keys() - set(wanted)
        needed = self._needed(self._last[storage] for storage in others)
        for index, operation in self._operations.items():
            if index > end and (index in needed or not others.isdisjoint(operation.writes)):
                return index - 1
        return self._count

    def is_random(self, storages: Iterable[int]) -> bool:
        """Whether what is in one of them hangs on random numbers."""
        needed = self._needed(self._last[storage] for storage in storages)
        return any(self._operations[index].random for index in needed)

    def prune(self) -> None:
        """Forget what no living tensor comes from, but for random numbers that are due."""
        storages: dict[int, Any] = self._storages
        self._last = {s: i for s, i in self._last.items() if not storages[s].expired()}
        undrawn = self._undrawn(self._count)
        inputs = [index for each in undrawn for index in self._operations[each].inputs]
        kept = self._needed([*self._last.values(), *inputs]).union(undrawn)
        self._operations = {index: self._operations[index] for index in sorted(kept)}
        named = {*self._last}
        for operation in self._operations.values():
            named |= operation.writes.union(operation.reads)
        self._touched = {s: index for s, index in self._touched.items() if s in named}
        self._sizes = {s: size for s, size in self._sizes.items() if s in named}
        self._storages = {s: ref for s, ref in self._storages.items() if s in named}

    def _undrawn(self, end: int) -> list[int]:
        return [i for i, op in self._operations.items() if op.random and not op.drawn and i <= end]

    def _needed(self, indices: Iterable[int]) -> set[int]:
        work, needed = list(indices), set[int]()
        while work:
            if (index := work.pop()) not in needed:
                needed.add(index)
                work.extend(self._operations[index].reads.values())
        return needed

    def _dead(self, order: list[int], live: set[int]) -> dict[int, set[int]]:
        """After which operation nobody reads which storages any more."""
        dead: dict[int, set[int]] = {}
        later: set[int] = set()
        for index in reversed(order):
            operation = self._operations[index]
            reads = set(operation.reads)
            dead[index] = (operation.writes | reads) - later
            later -= operation.whole
            # Only for the sake of the numbers that it draws, whatever memory holds.
            later |= reads if index in live else reads - operation.writes
        return dead


def on_meta(tensor: Tensor) -> bool:
    """Whether it has no memory."""
    # Not ``is_meta``, to which the recording gives another answer.
    return tensor.device.type == "meta"


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested collections."""
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]


def written_by(func: Any, args: Any, kwargs: Any, hosts: bool = False) -> list[Tensor]:
    """What an operation changes, by its schema: on the meta device, or else on the host."""
    written: list[Any] = []
    for place, argument in enumerate(func._schema.arguments):
        changed = argument.alias_info is not None and argument.alias_info.is_write
        # The schemas of batch normalisation do not say so.
        if changed or argument.name in ("running_mean", "running_var"):
            written.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return [each for each in tensors_in(written) if on_meta(each) is not hosts]


def name_of(call: Any) -> str:
    """Of an operation, without its overload."""
    return str(call.__name__).split(".")[0]


def _overwritten(call: Any, before: Mapping[int, View], written: list[Tensor]) -> set[int]:
    if len(written) != 1 or name_of(call) not in _OVERWRITING:
        return set()
    tensor, key = written[0], before[id(written[0])].storage
    shared = sum(view.storage == key for view in before.values()) > 1
    covers = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return {key} if covers and not shared else set()


_RANDOM = [torch.Tag.nondeterministic_seeded]
DRAWING = {"uniform_", "normal_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
_OVERWRITING = DRAWING | {"fill_", "zero_", "copy_", "random_", "_no_grad_trunc_normal_"}
