"""The base class of strategies: how one training loop is spread over devices and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.api.batch import move_batch
from torchweft.api.collectives import Alone, Collectives
from torchweft.api.folder import FolderLayout
from torchweft.api.initialising import SkipInit, default_dtype
from torchweft.api.place import Place
from torchweft.api.state import (
    load_named_module_state,
    load_named_optimizer_state,
    named_module_state,
    named_optimizer_state,
)

__all__ = ["CAPABILITIES", "DataShard", "Prepared", "Strategy"]


#: What a strategy may declare in ``cannot``, and what each means. All but the last four are
#: refused with the strategy's reason where a user asks for them.
CAPABILITIES: Mapping[str, str] = MappingProxyType(
    {
        "setup_apart": "module and optimizer are set up in separate calls",
        "clip_by_norm": "gradients are clipped by their global norm",
        "clip_by_value": "gradients are clipped by value",
        "no_backward_sync": "gradients of a micro-batch are not synchronised",
        "several_modules": "more than one model is set up",
        "unused_parameters": "parameters take no part in a loss, in some processes or in all",
        "frozen_parameters": "parameters of the model do not train",
        "shared_parameters": "a parameter has several names in the model",
        "differing_modules": "models that differ between the processes become that of rank 0",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShard:
    """Which data-parallel replicas a process feeds.

    Attributes:
        replicas: how many there are in the whole run.
        first: index of the first one that this process feeds.
        count: how many it feeds; a step of its loader takes this many per-device batches.
        processes: how many processes share each replica, and are fed the same: more than one
            where a model's computation is divided between processes.
    """

    replicas: int = 1
    first: int = 0
    count: int = 1
    processes: int = 1


@dataclass(slots=True, kw_only=True)
class Prepared:
    """What ``setup`` returns: the same things, ready, in the order given.

    Attributes:
        module: what the user's forward pass runs through.
        optimizers: in the order given.
        scheduler: the one given, or None.
    """

    module: nn.Module
    optimizers: list[Optimizer] = field(default_factory=list)
    scheduler: Any = None


class Strategy:
    """One process on one device by default; every member may be overridden.

    A complete strategy that averages gradients by hand, declared by
    ``StrategySpec(name="mean", target="my_package.mean:Mean", devices=("cpu",))``::

        class Mean(Strategy):
            owns_backward = True
            cannot = {"unused_parameters": "a gradient is averaged where every process has one"}

            def start(self, place):
                super().start(place)
                self.group = join_group(place, backend=place.accelerator.backend)
                self.modules = []

            def stop(self, failed):
                leave_group(self.group, failed=failed)

            @property
            def shard(self):
                rank = self.place.rank
                return DataShard(replicas=rank.world_size, first=rank.rank)

            @property
            def collectives(self):
                return ProcessGroup(self.place.device)

            def setup(self, module, optimizers, scheduler):
                self.modules.append(module)
                self.spread((*module.parameters(), *module.buffers()))
                return super().setup(module, optimizers, scheduler)

            def backward(self, loss, module, *args, **kwargs):
                super().backward(loss, module, *args, **kwargs)
                for module in self.modules:
                    for parameter in module.parameters():
                        if parameter.grad is not None:
                            parameter.grad = self.collectives.all_reduce(parameter.grad)
                    self.spread(module.buffers())

            def spread(self, tensors):
                for tensor in tensors:
                    tensor.data.copy_(self.collectives.broadcast(tensor))

    Gradients are averaged in ``backward``, not in ``step``: what is clipped in between has to be
    the average already. ``torchweft.testing.StrategyConformance`` finds out whether all of it is
    right.

    The constructor's keyword arguments are the strategy's options: what a user writes behind the
    name (``"ddp:bucket_cap_mb=50"``) is checked against its signature and annotations. The
    constructor does no input or output and touches no device; ``start`` does.
    """

    #: Name, devices and processes of an instance whose class no spec names.
    name: ClassVar[str] = ""
    devices: ClassVar[tuple[str, ...]] = ()
    processes: ClassVar[Literal["device", "node", "one"]] = "device"

    #: Whether ``loss.backward()`` in place of ``fabric.backward(loss)`` would be wrong.
    owns_backward: ClassVar[bool] = False

    #: Whether a process holds parts of parameters alone, so that ``model.state_dict()`` would be
    #: less than the model. It is an error then, which names ``fabric.save``. ``start`` may set it
    #: where options decide.
    splits_parameters: bool = False

    #: The same of ``optimizer.state_dict()``: whether the state is not in the user's optimizer.
    splits_optimizer: bool = False

    #: Whether all processes hold the same parameters and optimizer state between steps, so that
    #: any of them may write what is not split of a checkpoint; rank 0 writes it otherwise.
    replicas_stay_equal: ClassVar[bool] = False

    #: What it cannot do, by a capability of ``CAPABILITIES``, each with its reason and the way
    #: out. The constructor may set it where options decide.
    cannot: Mapping[str, str] = MappingProxyType({})

    #: Where it was started, by ``start``.
    place: Place

    # -- life ------------------------------------------------------------------------------------

    def start(self, place: Place) -> None:
        """Make the process group, where there is one. Called once in every process."""
        self.place = place

    def stop(self, failed: bool) -> None:
        """Leave the process group. ``failed``: without waiting for anybody."""

    @property
    def collectives(self) -> Collectives:
        """Communication between the processes that run the user's script."""
        return Alone()

    @property
    def shard(self) -> DataShard:
        """How many data-parallel replicas there are, and which of them this process feeds."""
        return DataShard()

    @property
    def mesh(self) -> Any:
        """The processes as a ``torch.distributed.device_mesh.DeviceMesh`` with named dimensions.

        None where the strategy arranges them in none.
        """
        return None

    # -- setup -----------------------------------------------------------------------------------

    def move_module(self, module: nn.Module) -> nn.Module:
        """A module on the device, before ``setup``; not called where the user declined.

        What is on the meta device is filled by the ``reset_parameters`` of its modules. Parameters
        stay the same objects, since an optimizer may hold them.
        """
        device = self.place.device
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            # Few models are; importing what fills them takes time.
            from torchweft.api.deferred import materialize

            materialize(module, device)
        return module.to(device)

    def setup(self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any) -> Prepared:
        """Make module and optimizers ready together, in the order given.

        ``module`` is already converted by the precision and, unless the user declined, on the
        device. Where parameters are replaced, the groups of the given optimizers are rewritten in
        place, matched by parameter name.
        """
        return Prepared(module=module, optimizers=list(optimizers), scheduler=scheduler)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Make an optimizer ready whose module was set up before, in a call of its own."""
        return optimizer

    @contextmanager
    def init_context(self, empty: bool | None = None) -> Iterator[None]:
        """Surrounds the construction of modules: right device, right dtype.

        ``empty``: leave parameters uninitialised, for a checkpoint to fill.
        """
        with ExitStack() as stack:
            stack.enter_context(self.tensor_context())
            if empty:
                stack.enter_context(SkipInit())
            yield

    @contextmanager
    def tensor_context(self) -> Iterator[None]:
        """Surrounds the creation of tensors: right device, right dtype."""
        with ExitStack() as stack:
            stack.enter_context(self.place.device)
            if self.place.precision.init_dtype is not None:
                stack.enter_context(default_dtype(self.place.precision.init_dtype))
            yield

    def original(self, module: nn.Module) -> nn.Module:
        """The user's module inside what ``setup`` returned."""
        return module

    # -- the step --------------------------------------------------------------------------------

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; ``args`` are those of ``Tensor.backward``."""
        self.place.precision.scale(loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Update the parameters; returns what the optimizer returns."""
        return self.place.precision.step(optimizer, closure)

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        """Forget gradients."""
        self.place.precision.zero_grad(optimizer, set_to_none)

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Surrounds forward and backward of one micro-batch.

        ``last``: this backward closes the step, so that gradients are synchronised in it.
        """
        return nullcontext()

    def clip(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip gradients that ``precision.unscale`` made true.

        By value (``clip_val``) or by the global norm (``max_norm``); returns the norm before
        clipping, a scalar tensor on the device, or None when clipping by value.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if clip_val is not None:
            nn.utils.clip_grad_value_(parameters, clip_val)
            return None
        assert max_norm is not None
        return nn.utils.clip_grad_norm_(
            parameters, max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite
        )

    def forward_method(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """A method of the user's module other than ``forward``, so that calling it is right."""
        method: Callable[..., Any] = getattr(self.original(module), name)
        return method

    # -- data ------------------------------------------------------------------------------------

    def move(self, batch: Any) -> Any:
        """A batch (nested collections, anything with ``.to``) on the device."""
        return move_batch(batch, self.place.device)

    def batch_boundary(self) -> None:
        """Called by the loader before each batch."""

    # -- state -----------------------------------------------------------------------------------

    def module_state(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """``(name, tensor)`` by the original module's names, one at a time, whole or DTensor.

        Called by every process; values that are not tensors (extra state) may appear too.
        """
        yield from named_module_state(self.original(module))

    def load_module_state(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Fill the module in place. Raises ``CheckpointError`` for what does not match."""
        load_named_module_state(self.original(module), state, strict)

    def optimizer_state(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> dict[str, Any]:
        """State keyed by parameter name: ``{"state": {name: …}, "param_groups": […]}``.

        ``modules`` are those that own the parameters, as ``setup`` returned them.
        """
        return named_optimizer_state(optimizer, [self.original(m) for m in modules])

    def load_optimizer_state(
        self, optimizer: Optimizer, modules: Sequence[nn.Module], state: Mapping[str, Any]
    ) -> None:
        """Restore what ``optimizer_state`` returned, or a state keyed by index."""
        load_named_optimizer_state(optimizer, [self.original(m) for m in modules], state)

    @property
    def folder_layout(self) -> FolderLayout | None:
        """How it writes models and optimizers to a folder; None: by name, as every strategy."""
        return None

    def extra_state(self) -> dict[str, Any]:
        """Counters and the like that the next step depends on; plain values and tensors."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what ``extra_state`` returned, perhaps that of another strategy.

        Ignore keys that are not this one's.
        """
