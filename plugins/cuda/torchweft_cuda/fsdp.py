"""Fully sharded data parallelism, by torch's ``fully_shard``, with tensor parallelism inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from torchweft.api import DataShard, DistributedStrategy, Place, Prepared
from torchweft.api.deferred import Deferred, Pending
from torchweft.api.initialising import SkipInit
from torchweft.errors import IncompatiblePlan, InvalidRequest
from torchweft_cuda.activations import checkpoint_activations
from torchweft_cuda.mesh import check_reshard, check_sizes, sizes_for
from torchweft_cuda.outputs import refuse_changes_in_place
from torchweft_cuda.parts import Choice, checked, choose, unshared
from torchweft_cuda.sharded import check_uneven, local, part_of, reduced, total_norm
from torchweft_cuda.sharded_precision import ShardedMixed
from torchweft_cuda.tensor_parallel import Parallelize, check_parallelize, divide

__all__ = ["FSDPStrategy"]

#: Bytes that travel together when tensors are sent to all processes, as in torch's own code.
_TOGETHER = 250 << 20


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
            gathered with the whole.
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
        self._compile: Mapping[str, Any] | None = {} if compile is True else compile or None
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
        self._replaced: Any = WeakIdKeyDictionary()
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
            policy = MixedPrecisionPolicy(
                param_dtype=precision.gathers_in, reduce_dtype=torch.float32
            )
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
        pending = self._deferred.pending(module)
        before = dict(module.named_parameters(remove_duplicate=False))
        if self._tensor > 1:
            # Divided from the first of the processes that compute together, which has rank 0's.
            self._bring(module.parameters())
            divide(module, self._mesh, self._how)
        parts = unshared(choose(module, "policy", self._policy), module)
        self._change_forward(module, parts)
        self._shard_parts(module, parts)
        if self._tensor > 1:
            check_uneven(module)
        self._bring(module.buffers())
        self._fill(module, pending)
        module.register_forward_hook(_free_after_evaluation)
        after = dict(module.named_parameters(remove_duplicate=False))
        for name, parameter in before.items():
            self._replaced[parameter] = after[name]
        for optimizer in optimizers:
            self.setup_optimizer(optimizer)
        if (send := self._sender(module)) is not None:
            module.register_forward_pre_hook(lambda *_: send())
        return Prepared(module=module, optimizers=list(optimizers), scheduler=scheduler)

    def _shard_parts(self, module: nn.Module, parts: Sequence[nn.Module]) -> None:
        """Parts in their order, then the rest of the module."""
        whole = {id(parameter) for parameter in module.parameters()}
        options = self._shard_options
        full = {**options, "mp_policy": MixedPrecisionPolicy()}
        if options["mp_policy"].param_dtype is not None:
            # Running statistics stay in 32-bit, and what normalises by them computes in one dtype.
            norms = [each for each in module.modules() if isinstance(each, _NormBase)]
            parts = [*norms, *(part for part in parts if part not in norms)]
        for part in (*parts, module):
            if self._tensor == 1:
                self._bring(p for p in part.parameters() if id(p) in whole)
            # What the last one gathers is needed again at once, by the first of the backward pass.
            reshard = False if part is module else self._reshard
            told = full if isinstance(part, _NormBase) else options
            fully_shard(part, reshard_after_forward=reshard, **told)
            refuse_changes_in_place(part)

    def _change_forward(self, module: nn.Module, parts: Sequence[nn.Module]) -> None:
        for each in choose(module, "activation_checkpointing", self._checkpointed):
            checkpoint_activations(each)
        if self._compile is not None:
            for each in parts or [module]:
                each.compile(**self._compile)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Put the sharded parameters in the place of those that the optimizer was made with."""
        for group in optimizer.param_groups:
            for index, old in enumerate(group["params"]):
                new = self._replaced.get(old)
                if new is None or new is old:
                    continue
                group["params"][index] = new
                if old in optimizer.state:
                    optimizer.state[new] = _as_sharded(optimizer.state.pop(old), new)
        return optimizer

    def _bring(self, tensors: Iterable[Tensor]) -> None:
        """Tensors to the device, with the values of rank 0; what has none yet stays as it is."""
        real = [tensor for tensor in tensors if not tensor.is_meta]
        for tensor in real:
            if tensor.device != self.place.device:
                tensor.data = tensor.data.to(self.place.device)
        self._send(real)

    def _send(self, tensors: Iterable[Tensor]) -> None:
        """The values of rank 0 to all, in place."""
        if self.place.rank.world_size == 1:
            return
        with torch.no_grad():
            group: Any = dist.group.WORLD
            sent = [tensor.detach() for tensor in tensors]
            if sent:
                dist._broadcast_coalesced(group, sent, _TOGETHER, 0)  # type: ignore[attr-defined]

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

    # -- the step --------------------------------------------------------------------------------

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Gradients stay whole and local in every micro-batch but the last of a step."""
        sharded: Any = module
        sharded.set_requires_gradient_sync(last)
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
        grads = [reduced(p.grad) for p in parameters if p.grad is not None]
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
        send = self._sender(module)

        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            if send is not None:
                send()
            output = method(*args, **kwargs)
            _free_after_evaluation(module)
            return output

        return run

    def _sender(self, module: nn.Module) -> Callable[[], None] | None:
        """What sends the buffers of rank 0, where there are any to be sent."""
        # The modules are looked for once; their buffers may be replaced at any time.
        owners = [each for each in module.modules() if each._buffers]
        if not owners or not self._broadcast_buffers or self.place.rank.world_size == 1:
            return None

        def send() -> None:
            found = [buffer for each in owners for buffer in each._buffers.values()]
            self._send(buffer for buffer in found if buffer is not None)

        return send

    # -- state -----------------------------------------------------------------------------------

    def load_module_state(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Each process takes its parts of the tensors."""
        own = module.state_dict()
        parts = {
            name: part_of(value, own[name]) if name in own else value
            for name, value in state.items()
        }
        super().load_module_state(module, parts, strict)

    def load_optimizer_state(
        self, optimizer: Optimizer, modules: Sequence[nn.Module], state: Mapping[str, Any]
    ) -> None:
        """Each process takes its parts of the tensors."""
        super().load_optimizer_state(optimizer, modules, state)
        for parameter, held in optimizer.state.items():
            optimizer.state[parameter] = _as_sharded(held, parameter)


def _free_after_evaluation(module: Any, *_: Any) -> None:
    """Free what a forward pass gathered for a backward pass that will not come."""
    if not torch.is_grad_enabled():
        module.reshard()


def _as_sharded(state: Mapping[str, Any], parameter: Any) -> dict[str, Any]:
    return {key: part_of(value, parameter) for key, value in state.items()}
