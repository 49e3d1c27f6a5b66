"""Data parallel on XLA devices: one process drives all of its host's, and each has a copy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.api import (
    Alone,
    Collectives,
    DataShard,
    Group,
    Place,
    ProcessGroup,
    Strategy,
    join_group,
    leave_group,
    map_leaves,
)
from torchweft.errors import InvalidRequest, Misuse
from torchweft_xla.library import runtime, torch_xla
from torchweft_xla.spreading import Spread
from torchweft_xla.watching import Shapes, Watch

__all__ = ["SingleXLA", "XLAStrategy"]

# What a script may bring to the device that needs none: fabric.to_device(None).
_PLAIN = (type(None), str, bytes, bool, int, float)


class XLAStrategy(Strategy):
    """A copy of the model on each device; a batch is divided between all of them.

    GSPMD: Xu et al., 2021 (arXiv:2105.04663). One process drives all devices of its host, which
    are one ``torch.device``; the model computes with whole batches, and XLA makes of that what
    each device does. So the loss that is read is that of the whole batch, the statistics of a
    batch norm are the whole batch's, and ``dropout`` draws one mask for all of it.

    A graph is compiled and run for each batch of a loader that was set up, otherwise for each
    ``optimizer.step()``.

    Args:
        timeout: seconds that a collective between hosts may take before the run is given up.
    """

    name = "xla"
    devices = ("xla",)
    processes: ClassVar[Literal["device", "node", "one"]] = "node"
    replicas_stay_equal = True

    def __init__(self, *, timeout: float = 1800.0) -> None:
        self._timeout = timeout
        #: None with one device.
        self._spread: Spread | None = None
        self._group: Group | None = None
        self._collectives: Collectives = Alone()
        self._loader_ends_graph = False
        self._shapes = Shapes()
        self._watch: Watch | None = None

    # -- life ------------------------------------------------------------------------------------

    def start(self, place: Place) -> None:
        """Meet the other hosts, where there are any, and count the devices."""
        super().start(place)
        self._watch = Watch()
        hosts = place.rank.world_size
        if runtime.is_spmd():
            found = runtime.process_count()
            if found != hosts:
                raise Misuse(
                    f"strategy '{self.name}' runs on {hosts} hosts, and XLA knows of {found}: "
                    "start the script once on every host of one TPU slice"
                )
            self._spread = Spread(hosts)
        if hosts > 1:
            limit = timedelta(seconds=self._timeout)
            self._group = join_group(place, backend=place.accelerator.backend, timeout=limit)
            self._collectives = ProcessGroup(torch.device("cpu"))

    def stop(self, failed: bool) -> None:
        """Leave the other hosts."""
        if self._watch is not None:
            self._watch.close()
        if self._group is not None:
            leave_group(self._group, failed=failed)

    @property
    def collectives(self) -> Collectives:
        """Between hosts."""
        return self._collectives

    @property
    def shard(self) -> DataShard:
        """A replica per device."""
        if self._spread is None:
            return DataShard()
        local = self._spread.local
        first = self.place.rank.rank * local
        return DataShard(replicas=self._spread.devices, first=first, count=local)

    # -- setup -----------------------------------------------------------------------------------

    def move_module(self, module: nn.Module) -> nn.Module:
        """A module on the device."""
        # Otherwise .to(device) would make new parameters, of which an optimizer knows nothing.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return super().move_module(module)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    # -- the step --------------------------------------------------------------------------------

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Update the parameters, and end the graph where no loader will."""
        result = super().step(optimizer, closure)
        if self._loader_ends_graph:
            # Once: who takes several steps with one batch has them one by one.
            self._loader_ends_graph = False
        else:
            self._end_graph()
        return result

    def _end_graph(self) -> None:
        torch_xla.sync()
        if self._watch is not None:
            self._watch.ended()

    # -- data ------------------------------------------------------------------------------------

    def batch_boundary(self) -> None:
        """End the graph: the device begins with it while the next batch is fetched and sent."""
        self._end_graph()
        self._loader_ends_graph = True

    def move(self, batch: Any) -> Any:
        """A batch on the devices, each with its part of the first dimension.

        What cannot be divided evenly is copied to each, which changes no result. Raises
        ``InvalidRequest`` where that would, on several hosts, and for a batch without tensors.
        """
        shapes: list[torch.Size] = []
        moved = map_leaves(batch, partial(self._send, shapes))
        if not shapes and not isinstance(batch, _PLAIN):
            raise InvalidRequest(
                f"strategy '{self.name}' was given a batch without a tensor, "
                f"{_described(batch)}, which no XLA device can hold; have the DataLoader's "
                "collate_fn make tensors of it, or write "
                "setup_dataloaders(loader, move_to_device=False)"
            )
        self._shapes.note(tuple(shapes))
        return moved

    def _send(self, shapes: list[torch.Size], leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            if not hasattr(leaf, "to"):
                return leaf
            # It knows best which of its tensors to move.
            shapes.append(torch.Size())
            return leaf.to(self.place.device)
        shapes.append(leaf.shape)
        spread = self._spread
        if spread is None or leaf.device.type != "cpu":
            return leaf.to(self.place.device)
        if leaf.dim() == 0:
            return spread.send(leaf, None)
        if leaf.shape[0] % spread.local == 0:
            return spread.send(leaf, 0)
        if spread.hosts > 1:
            raise InvalidRequest(
                f"strategy '{self.name}' on {spread.hosts} hosts was given a batch with a tensor "
                f"of shape {tuple(leaf.shape)}, whose first dimension cannot be divided between "
                f"the {spread.local} devices of a host; write drop_last=True in the DataLoader, or "
                "have its collate_fn fill the last batch up"
            )
        return spread.send(leaf, None)

    # -- state -----------------------------------------------------------------------------------

    def module_state(self, module: nn.Module) -> Any:
        """``(name, tensor)``, once everything that is pending is computed."""
        torch_xla.sync()
        yield from super().module_state(module)


class SingleXLA(XLAStrategy):
    """One process on one device, with a graph for each step."""

    name = "single_xla"
    processes = "one"

    def __init__(self) -> None:
        super().__init__()


def _described(batch: Any) -> str:
    inside = batch
    while isinstance(inside, list | tuple) and inside:
        inside = inside[0]
    whole = type(batch).__name__
    return f"a {whole}" if inside is batch else f"a {whole} of {type(inside).__name__}"
