"""Models that are made without memory, and filled later with what they would have held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from torchweft.api.deferred.recording import (
    Functions,
    Operations,
    overridable_truncated_normal,
    registered,
)
from torchweft.api.deferred.resetting import resets
from torchweft.api.deferred.slots import Settle, Slot, attributes, named_tensors, own_tensors
from torchweft.api.deferred.tape import META, Memory, Tape, View, on_meta
from torchweft.api.initialising import default_dtype

__all__ = ["Deferred", "Pending", "Settle", "materialize"]


class Deferred:
    """What the construction of models did to their tensors, to be done again on a device.

    ::

        deferred = Deferred()
        with deferred.recording():
            model = Transformer()                 # on the meta device
        pending = deferred.pending(model)         # before its tensors are replaced
        ...                                       # shard the model
        pending.fill(device, settle)              # settle(("head.weight",), whole), one by one

    All models of one ``Deferred`` are on one tape. Filling a model draws, in order, all random
    numbers that were asked for until the next model was begun and that no fill drew before, also
    those that ended nowhere, and those of the model itself in any case. So models that are filled
    in the order in which they were made get the values, and leave the generator behind, as if
    they had been made on the device at that time. One that is filled after a later one gets
    numbers of its own.

    What a constructor asks of a tensor (``item()``, ``if``, ``tolist()``) is computed on the CPU,
    unless it hangs on a random number, which is not drawn yet: that is an error. Tensors that are
    made with ``device="cpu"`` are real from the start, and a generator that is passed explicitly
    draws when the model is filled.
    """

    def __init__(self) -> None:
        self._tape = Tape()
        self._active = False
        # What a tensor was before somebody put other storage behind it: ``module.to(dtype)``.
        self._origins: Any = WeakIdKeyDictionary()

    @contextmanager
    def recording(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Make what is constructed in the block on the meta device; ``dtype``: the default one."""
        with ExitStack() as stack:
            if dtype is not None:
                stack.enter_context(default_dtype(dtype))
            if not self._active:
                stack.enter_context(self._recording())
            yield

    @contextmanager
    def _recording(self) -> Iterator[None]:
        self._active = True
        modules: Any = WeakIdKeyDictionary()
        operations = Operations(self._tape)
        try:
            with (
                registered(modules),
                overridable_truncated_normal(),
                operations,
                META,
                Functions(self._tape, operations),
            ):
                yield
        finally:
            self._active = False
            self._note_origins(modules)
            self._tape.prune()

    def _note_origins(self, modules: Iterable[nn.Module]) -> None:
        seen: set[nn.Module] = set()
        for top in modules:
            for _, module in top.named_modules(memo=seen):
                for tensor in own_tensors(module).values():
                    if self._tape.knows(tensor):
                        self._origins[tensor] = (View.of(tensor), tensor.untyped_storage())

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tape holds what becomes of the tensor."""
        return self._view(tensor) is not None

    def pending(self, module: nn.Module) -> Pending:
        """What of the module is on the meta device, as its tensors are now.

        Raises ``InvalidRequest`` for a part that was made on the meta device without a recording
        and has no ``reset_parameters()``.
        """
        self._tape.prune()
        return Pending(module, self._tape, self._view, self._origins)

    def _view(self, tensor: Tensor) -> View | None:
        if not on_meta(tensor):
            return None
        if self._tape.knows(tensor):
            return View.of(tensor)
        origin = self._origins.get(tensor)
        return None if origin is None else origin[0]


class Pending:
    """The tensors of a module that wait for their values.

    Parameters and buffers are known by their names and settled by the caller, so that they may be
    replaced by others in between. Tensors in plain attributes, also those in lists, tuples and
    dictionaries there, are set by ``fill``. What no recording knows is filled module by module by
    ``reset_parameters()``, run on whole tensors that take the places of the present ones; torch's
    MultiheadAttention calls its own ``_reset_parameters``.
    """

    def __init__(
        self,
        module: nn.Module,
        tape: Tape,
        view: Callable[[Tensor], View | None],
        origins: Any,
    ) -> None:
        self._tape = tape
        self._origins = origins
        self._slots: dict[int, list[Slot]] = {}
        tensors: dict[int, Tensor] = {}
        names: dict[int, tuple[str, ...]] = {}
        for name, tensor in named_tensors(module).items():
            if on_meta(tensor):
                tensors[id(tensor)] = tensor
                names[id(tensor)] = (*names.get(id(tensor), ()), name)
        for key, tensor in tensors.items():
            if (found := view(tensor)) is not None:
                self._await(Slot(names.pop(key), tensor, found))
        self._resets = list(resets(module, names))
        for owner, attribute, tensor in attributes(module):
            if id(tensor) not in tensors and (found := view(tensor)) is not None:
                self._await(Slot((), tensor, found, owner, attribute))
        #: Of all parameters and buffers that will be settled, each with its other names.
        self.names: tuple[tuple[str, ...], ...] = (
            *(slot.names for slots in self._slots.values() for slot in slots if slot.names),
            *(each for reset in self._resets for each in reset.names.values()),
        )

    def _await(self, slot: Slot) -> None:
        self._slots.setdefault(slot.view.storage, []).append(slot)

    def fill(self, device: torch.device, settle: Settle) -> None:
        """Make the tensors on ``device``, each handed to ``settle`` as soon as it is complete.

        No more of them exist at a time than the constructor was working on at a time.
        """

        def deliver(storage: int, memory: Memory) -> None:
            for slot in self._slots.pop(storage):
                self._origins.pop(slot.tensor, None)
                slot.settle(memory.tensor(slot.view), settle)

        if self._slots:
            self._tape.replay(list(self._slots), device, deliver, draws=True)
        while self._resets:
            self._resets.pop(0).fill(device, settle)
        self._tape.prune()


def materialize(module: nn.Module, device: torch.device, deferred: Deferred | None = None) -> None:
    """Fill a module whole and in place.

    Parameters and buffers stay the same objects, for the optimizers that were made with them.
    """
    tensors = named_tensors(module)

    def settle(names: tuple[str, ...], whole: Tensor) -> None:
        tensor = tensors[names[0]]
        real = whole.detach().requires_grad_(tensor.requires_grad)
        # Neither ``tensor.data =`` may change the kind of device, nor ``torch.utils.swap_tensors``
        # be used where there are weak references, as those of an LSTM to its weights.
        torch._C._swap_tensor_impl(tensor, real)

    (deferred or Deferred()).pending(module).fill(device, settle)
