"""Fully sharded data parallelism, by torch's ``fully_shard``, with tensor parallelism inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from datetime import timedelta
from functools import wraps
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from torchweft.api import DataShard, DistributedStrategy, Place, Prepared
from torchweft.api.activations import checkpoint_activations
from torchweft.api.choosing import Choice
from torchweft.api.deferred import Deferred, Pending
from torchweft.api.initialising import SkipInit
from torchweft.api.state import as_written, parameter_names
from torchweft.errors import IncompatiblePlan, InvalidRequest
from torchweft_cuda.compiling import check_compile, compile_parts
from torchweft_cuda.forward import Surroundings, free
from torchweft_cuda.mesh import check_reshard, check_sizes, sizes_for
from torchweft_cuda.outputs import refuse_changes_in_place
from torchweft_cuda.parts import checked, choose, unshared
from torchweft_cuda.sending import brought, send
from torchweft_cuda.sharded import check_uneven, local, part_of, total_norm
from torchweft_cuda.sharded_precision import ShardedMixed
from torchweft_cuda.tensor_parallel import Parallelize, check_parallelize, divide

__all__ = ["FSDPStrategy"]


class FSDPStrategy(DistributedStrategy):
    """Parameters, gradients and optimizer state are split between the processes.

    Zhao et al., 2023 (arXiv:2304.11277), in torch's second form, ``fully_shard``. Parameters of a
    part are gathered for its forward and its backward pass, and gradients are scattered as they
    are reduced. Works between GPUs (nccl) and between CPU processes (gloo). A model made under
    ``fabric.init_module()`` takes memory when it is set up, and of each process its part alone.

    Options that choose modules take names of classes joined by ``"+"``, classes, or a function of
    a module.

    Args:
        policy: which parts are gathered one by one; ``"auto"``: the outermost modules with at most
            a quarter of all parameters; None: the model in one piece. What is in no such part is
            gathered with the whole, and so is a part with a parameter that is the rest's too.
        reshard_after_forward: whether a part's parameters are freed between its forward and its
            backward pass, and gathered again; a number: split between so many processes meanwhile.
            What is gathered with the whole stays until the backward pass, which needs it at once.
        mixed_precision: a ``torch.distributed.fsdp.MixedPrecisionPolicy``; None: what the
            precision says.
        cpu_offload: parameters, gradients and optimizer state are in the host's memory, and go to
            the device part by part.
        activation_checkpointing: which modules compute their forward pass again in the backward
            pass, in place of keeping what they computed.
        compile: whether each part is compiled by itself, the model where there are none; a dict:
            arguments of ``torch.compile``.
        replicate: how many copies of the model there are, each split between as many processes as
            are left: hybrid sharding. None: one, or what ``shard`` leaves.
        shard: between how many processes a copy is split. None: all that are left.
        tensor: how many processes compute a layer together: tensor parallelism (Shoeybi et al.,
            2019, arXiv:1909.08053). They are fed the same batches.
        parallelize: says what is divided by ``tensor``: a function of (model, mesh), a dict of
            ``torch.distributed.tensor.parallel`` styles by names of modules, in which ``*`` stands
            for a part of a name, or where one is found, ``"package.module:name"``; None: the
            method ``parallelize(mesh)`` of the model.
        broadcast_buffers: whether every forward pass starts from the buffers of rank 0.
        timeout: seconds that a collective may take before the run is given up.
    """

    name = "fsdp"
    devices = ("cuda", "cpu")
    splits_parameters = True
    replicas_stay_equal = True
    cannot: Mapping[str, str] = {
        "unused_parameters": "the gradients of a part are reduced together, so that every process "
        "has to make the same use of it; use strategy 'ddp:find_unused_parameters=true'",
    }

    def __init__(
        self,
        *,
        policy: Choice = None,
        reshard_after_forward: bool | int = True,
        mixed_precision: MixedPrecisionPolicy | None = None,
        cpu_offload: bool = False,
        activation_checkpointing: Choice = None,
        compile: bool | Mapping[str, Any] = False,
        replicate: int | None = None,
        shard: int | None = None,
        tensor: int = 1,
        parallelize: Parallelize = None,
        broadcast_buffers: bool = True,
        timeout: float = 1800.0,
    ) -> None:
        self._policy = checked("policy", policy)
        self._checkpointed = checked("activation_checkpointing", activation_checkpointing)
        self._reshard = reshard_after_forward
        if not isinstance(mixed_precision, MixedPrecisionPolicy | None):
            raise InvalidRequest(
                f"strategy 'fsdp' was given mixed_precision={mixed_precision!r}; it takes a "
                "torch.distributed.fsdp.MixedPrecisionPolicy, and precision='bf16-mixed' says the "
                "usual"
            )
        self._mixed_precision = mixed_precision
        self._offload = cpu_offload
        self._compile = check_compile(compile)
        self._sizes = {"replicate": replicate, "shard": shard, "tensor": tensor}
        check_sizes(**self._sizes)
        self._how = check_parallelize(parallelize)
        self._broadcast_buffers = broadcast_buffers
        self.timeout = timeout

    # -- life ------------------------------------------------------------------------------------

    def start(self, place: Place) -> None:
        """Join the process group, and arrange its processes in a mesh."""
        sizes = sizes_for(place.rank.world_size, **self._sizes)
        check_reshard(self._reshard, sizes)
        super().start(place)
        self._tensor = sizes.tensor
        self._mesh = init_device_mesh(place.device.type, sizes.shape, mesh_dim_names=sizes.names)
        for name in sizes.names:
            # A group of some of the processes has torch's own limit otherwise.
            _set_pg_timeout(timedelta(seconds=self.timeout), self._mesh.get_group(name))
        # Of every parameter that a model ever had, the sharded one; the latter are their own.
        self._replaced: Any = WeakIdKeyDictionary()
        self._modules: WeakSet[nn.Module] = WeakSet()
        self._deferred = Deferred()
        self._shard_options = self._options()

    def backend(self, place: Place) -> str:
        """The accelerator's, and gloo beside it for what is on the host."""
        own, kind = super().backend(place), place.device.type
        return f"cpu:gloo,{kind}:{own}" if self._offload and kind != "cpu" else own

    def _options(self) -> dict[str, Any]:
        """What ``fully_shard`` is given for every part."""
        names = self._mesh.mesh_dim_names or ()
        data = tuple(name for name in names if name != "tensor")
        on_host = self.place.device.type == "cpu"
        offload = CPUOffloadPolicy(pin_memory=not on_host) if self._offload else OffloadPolicy()
        return {
            "mesh": self._mesh if data == names else self._mesh[data],
            "mp_policy": self._precision_policy(),
            "offload_policy": offload,
        }

    def _precision_policy(self) -> Any:
        precision = self.place.precision
        if isinstance(precision, ShardedMixed):
            policy = MixedPrecisionPolicy(param_dtype=precision.dtype, reduce_dtype=torch.float32)
        else:
            policy = MixedPrecisionPolicy()
        if self._mixed_precision is None:
            return policy
        if policy != MixedPrecisionPolicy():
            raise IncompatiblePlan(
                f"precision '{self.place.plan.precision.name}' and the mixed_precision= of "
                "strategy 'fsdp' both say in which dtype parameters are gathered; leave one of "
                "them out"
            )
        return self._mixed_precision

    @property
    def shard(self) -> DataShard:
        """One replica per process, or per group of processes that compute layers together."""
        rank, together = self.place.rank, self._tensor
        return DataShard(
            replicas=rank.world_size // together, first=rank.rank // together, processes=together
        )

    @property
    def mesh(self) -> Any:
        """Dimensions, from the outermost: ``"replicate"``, ``"shard"``, ``"tensor"``.

        Without those of size 1, but for ``"shard"``, which is there always.
        """
        return self._mesh

    # -- setup -----------------------------------------------------------------------------------

    @contextmanager
    def init_context(self, empty: bool | None = None) -> Iterator[None]:
        """Modules are made on the meta device, and filled part by part when they are set up."""
        recording = self._deferred.recording(self.place.precision.init_dtype)
        with recording, SkipInit() if empty else nullcontext():
            yield

    def move_module(self, module: nn.Module) -> nn.Module:
        """The module as it is: it goes to the device part by part, as it is sharded."""
        return module

    def setup(self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any) -> Prepared:
        """Shard the module in place; its parameters become new ones, of which each has a part."""
        self._check_unsharded(module)
        pending = self._deferred.pending(module)
        before = dict(module.named_parameters(remove_duplicate=False))
        if self._tensor > 1:
            # Divided from the first of the processes that compute together, which has rank 0's.
            with brought(module.parameters(), self.place.device):
                divide(module, self._mesh, self._how)
        parts = unshared(choose(module, "policy", self._policy), module)
        for each in choose(module, "activation_checkpointing", self._checkpointed):
            checkpoint_activations(each)
        if self._compile is not None:
            compile_parts(parts or [module], self._compile, divided=self._tensor > 1)
        self._shard_parts(module, parts)
        if self._tensor > 1:
            check_uneven(module)
        for buffer in module.buffers():
            if not buffer.is_meta:
                buffer.data = buffer.data.to(self.place.device)
        send(buffer for buffer in module.buffers() if not buffer.is_meta)
        self._fill(module, pending)
        Surroundings(module, self._sender(module)).hook(module)
        self._follow(module, before)
        for optimizer in optimizers:
            self.setup_optimizer(optimizer)
        return Prepared(module=module, optimizers=list(optimizers), scheduler=scheduler)

    def _check_unsharded(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if self._replaced.get(parameter) is parameter:
                raise InvalidRequest(
                    f"'{name}' of {type(module).__name__} was set up with another model already, "
                    "and a parameter cannot be sharded twice; set up one module that holds both "
                    "models, and call mark_forward_method() for the methods that run them"
                )

    def _shard_parts(self, module: nn.Module, parts: Sequence[nn.Module]) -> None:
        """Parts in their order, then the rest of the module."""
        whole = {id(parameter) for parameter in module.parameters()}
        options = self._shard_options
        full = {**options, "mp_policy": MixedPrecisionPolicy()}
        if options["mp_policy"].param_dtype is not None:
            # Running statistics stay in 32-bit, and what normalises by them computes in one dtype.
            norms = [each for each in module.modules() if isinstance(each, _NormBase)]
            parts = [*norms, *(part for part in parts if part not in norms)]
        for part in (*(each for each in parts if each is not module), module):
            # What is divided has the values of rank 0 already, and is on the device.
            own = (p for p in part.parameters() if id(p) in whole and not isinstance(p, DTensor))
            # What the last one gathers is needed again at once, by the first of the backward pass.
            reshard = False if part is module else self._reshard
            told = full if isinstance(part, _NormBase) else options
            with brought(own, self.place.device):
                fully_shard(part, reshard_after_forward=reshard, **told)
            refuse_changes_in_place(part)

    def _follow(self, module: nn.Module, before: Mapping[str, nn.Parameter]) -> None:
        """Note which parameters became which."""
        self._modules.add(module)
        for name, new in module.named_parameters(remove_duplicate=False):
            old = before[name]
            for attribute, value in vars(old).items():
                vars(new).setdefault(attribute, value)
            self._replaced[old] = self._replaced[new] = new

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Put the sharded parameters in the place of those that the optimizer was made with.

        These are the ones from before ``setup``, or, after a forward pass, the gathered ones.
        """
        for module in self._modules:
            now = dict(module.named_parameters(remove_duplicate=False))
            free(module)
            for name, sharded in module.named_parameters(remove_duplicate=False):
                self._replaced[now[name]] = sharded
        for group in optimizer.param_groups:
            for index, old in enumerate(group["params"]):
                new = self._replaced.get(old)
                if new is None or new is old:
                    continue
                group["params"][index] = new
                if old in optimizer.state:
                    optimizer.state[new] = _as_sharded(optimizer.state.pop(old), new)
        return optimizer

    def _fill(self, module: nn.Module, pending: Pending) -> None:
        """Give what is on the meta device memory, and the values that its construction gives."""
        parameters = {id(parameter) for parameter in module.parameters()}
        of_parameters = torch.device("cpu") if self._offload else self.place.device

        def allocate(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return tensor
            device = of_parameters if id(tensor) in parameters else self.place.device
            return torch.empty_like(tensor, device=device)

        if pending.names:
            module._apply(allocate)  # type: ignore[no-untyped-call]
        buffers, own = module.named_buffers, module.named_parameters
        named = dict([*buffers(remove_duplicate=False), *own(remove_duplicate=False)])

        def settle(names: tuple[str, ...], whole: Tensor) -> None:
            # Seeds may differ between the processes; the values of rank 0 count. Sent as it is,
            # since every other way would need the memory once more.
            whole = whole.contiguous()
            if self.place.rank.world_size > 1:
                dist.broadcast(whole, src=0)
            target = named[names[0]].detach()
            local(target).copy_(local(part_of(whole, target)))

        pending.fill(self.place.device, settle)

    def _sender(self, module: nn.Module) -> Callable[[], None] | None:
        """What sends the buffers of rank 0, where there are any to be sent."""
        # The modules are looked for once; their buffers may be replaced at any time.
        owners = [each for each in module.modules() if each._buffers]
        if not owners or not self._broadcast_buffers or self.place.rank.world_size == 1:
            return None

        def send_buffers() -> None:
            found = [buffer for each in owners for buffer in each._buffers.values()]
            send(buffer for buffer in found if buffer is not None)

        return send_buffers

    # -- the step --------------------------------------------------------------------------------

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Gradients stay whole and local in every micro-batch but the last of a step."""
        if last:  # as it is otherwise; torch walks through the model to say so
            yield
            return
        sharded: Any = module
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    @torch.no_grad()  # what a process holds is then its own to change, without a way back
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
        """By value part by part, or by the norm of all parts of all processes."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        held = [local(grad) for grad in grads]
        if clip_val is not None:
            torch._foreach_clamp_min_(held, -clip_val)
            torch._foreach_clamp_max_(held, clip_val)
            return None
        assert max_norm is not None
        norm = total_norm(grads, float(norm_type), self.place.device)
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"the total norm of order {norm_type} of the gradients is {norm.item()}, so that "
                "they cannot be clipped; pass error_if_nonfinite=False to go on all the same"
            )
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if held:
            torch._foreach_mul_(held, scale.to(held[0].device))
        return norm

    def forward_method(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """The method, with parameters gathered and buffers sent as for ``forward``."""
        register_fsdp_forward_method(module, name)
        method = super().forward_method(module, name)
        surroundings = Surroundings(module, self._sender(module))

        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            with surroundings.around():
                return method(*args, **kwargs)

        return run

    # -- state -----------------------------------------------------------------------------------

    def load_module_state(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Each process takes its parts of the tensors."""
        own = dict(self.module_state(module))
        parts: Any = copy(state)
        for name, value in state.items():
            parts[name] = part_of(value, own.get(as_written(name)))
        super().load_module_state(module, parts, strict)

    def optimizer_state(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> dict[str, Any]:
        """Of the sharded parameters, also where others were gathered and are not free yet."""
        for module in modules:
            free(module)
        return super().optimizer_state(optimizer, modules)

    def load_optimizer_state(
        self, optimizer: Optimizer, modules: Sequence[nn.Module], state: Mapping[str, Any]
    ) -> None:
        """Each process takes its parts of the tensors."""
        for module in modules:
            free(module)
        names = parameter_names([self.original(module) for module in modules])
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # By name, or by index as plain torch writes it.
        own: dict[Any, Any] = {**dict(enumerate(held)), **{names.get(id(p)): p for p in held}}
        parts = {**state}
        if isinstance(state.get("state"), Mapping):
            parts["state"] = {
                key: _as_sharded(value, own.get(key)) if isinstance(value, Mapping) else value
                for key, value in state["state"].items()
            }
        super().load_optimizer_state(optimizer, modules, parts)


def _as_sharded(state: Mapping[str, Any], parameter: Any) -> dict[str, Any]:
    return {key: part_of(value, parameter) for key, value in state.items()}
