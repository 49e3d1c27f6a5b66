"""Fully sharded data parallelism, by torch's ``fully_shard``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from torchweft.api import (
    Collectives,
    DataShard,
    Place,
    Prepared,
    ProcessGroup,
    Strategy,
    join_group,
    leave_group,
)
from torchweft.errors import InvalidRequest

__all__ = ["FSDPStrategy"]

Policy = str | Callable[[nn.Module], bool] | Iterable[type[nn.Module]] | None


class FSDPStrategy(Strategy):
    """Parameters, gradients and optimizer state are split between the processes.

    Zhao et al., 2023 (arXiv:2304.11277), in torch's second form, ``fully_shard``. Parameters of a
    part are gathered for its forward and its backward pass, and gradients are scattered as they
    are reduced. Works between GPUs (nccl) and between CPU processes (gloo).

    Args:
        policy: which parts are gathered one by one: names of classes joined by ``"+"``, classes,
            or a function of a module; None: the model in one piece. What is in no such part is
            gathered with the whole.
        reshard_after_forward: whether a part's parameters are freed between its forward and its
            backward pass, and gathered again.
        replicate: how many copies of the model there are, each split between as many processes as
            are left: hybrid sharding. 1: the model is split between all processes.
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
        policy: Policy = None,
        reshard_after_forward: bool = True,
        replicate: int = 1,
        broadcast_buffers: bool = True,
        timeout: float = 1800.0,
    ) -> None:
        self._policy = _checked(policy)
        self._reshard = reshard_after_forward
        if replicate < 1:
            raise InvalidRequest(
                f"strategy 'fsdp' was given replicate={replicate}; it counts copies, from 1"
            )
        self._replicate = replicate
        self._broadcast_buffers = broadcast_buffers
        self._timeout = timeout

    # -- life ------------------------------------------------------------------------------------

    def start(self, place: Place) -> None:
        """Join the process group."""
        super().start(place)
        self._shape = _mesh_shape(place.rank.world_size, self._replicate)
        self._group = join_group(
            place, backend=place.accelerator.backend, timeout=timedelta(seconds=self._timeout)
        )
        self._collectives = ProcessGroup(place.device)
        self._replaced: Any = WeakIdKeyDictionary()
        self._mesh: Any = None

    def stop(self, failed: bool) -> None:
        """Leave the process group."""
        leave_group(self._group, failed=failed)

    @property
    def collectives(self) -> Collectives:
        """Over the default process group."""
        return self._collectives

    @property
    def shard(self) -> DataShard:
        """One replica per process."""
        rank = self.place.rank
        return DataShard(replicas=rank.world_size, first=rank.rank)

    # -- setup -----------------------------------------------------------------------------------

    def setup(self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any) -> Prepared:
        """Shard the module in place; its parameters become new ones, of which each has a part."""
        from torch.distributed.fsdp import fully_shard

        self._spread((*module.parameters(), *module.buffers()))
        before = dict(module.named_parameters())
        options = {"mesh": self._make_mesh(), "reshard_after_forward": self._reshard}
        for part in self._parts(module):
            fully_shard(part, **options)
        fully_shard(module, **options)
        after = dict(module.named_parameters())
        for name, parameter in before.items():
            self._replaced[parameter] = after[name]
        for optimizer in optimizers:
            self.setup_optimizer(optimizer)
        if self._broadcast_buffers and any(True for _ in module.buffers()):
            module.register_forward_pre_hook(lambda module, _: self._spread(module.buffers()))
        return Prepared(module=module, optimizers=list(optimizers), scheduler=scheduler)

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

    def _make_mesh(self) -> Any:
        if self._mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            names = ("replicate", "shard")[-len(self._shape) :]
            self._mesh = init_device_mesh(self.place.device.type, self._shape, mesh_dim_names=names)
        return self._mesh

    def _parts(self, module: nn.Module) -> list[nn.Module]:
        """What the policy chooses, inner modules before those around them."""
        if self._policy is None:
            return []
        chooses = _chooser(self._policy)
        inner = [each for each in module.modules() if each is not module]
        chosen = [each for each in inner if chooses(each)]
        if not chosen:
            classes = sorted({type(each).__name__ for each in inner})
            raise InvalidRequest(
                f"strategy 'fsdp' was given the policy {self._policy!r}, which chooses no part of "
                f"{type(module).__name__}; its modules are of the classes {', '.join(classes)}"
            )
        # A parameter with a second name elsewhere is gathered with the whole, for both.
        return [part for part in reversed(chosen) if not _shares(part, module)]

    def _spread(self, tensors: Iterable[Tensor]) -> None:
        if dist.get_world_size() == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                held = tensor.detach()
                sent = held.contiguous()
                dist.broadcast(sent, src=0)
                if sent is not held:
                    held.copy_(sent)

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
        if clip_val is not None:
            for grad in grads:
                _local(grad).clamp_(-clip_val, clip_val)
            return None
        assert max_norm is not None
        norm = _whole(nn.utils.get_total_norm(grads, norm_type))
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"the total norm of order {norm_type} of the gradients is {norm.item()}, so that "
                "they cannot be clipped; pass error_if_nonfinite=False to go on all the same"
            )
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            _local(grad).mul_(scale)
        return norm

    def forward_method(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """The method, with parameters gathered as for ``forward``."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(module, name)
        return super().forward_method(module, name)

    # -- state -----------------------------------------------------------------------------------

    def load_module_state(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Each process takes its parts of the tensors."""
        own = module.state_dict()
        parts = {
            name: _part_of(value, own[name]) if name in own else value
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


def _mesh_shape(processes: int, replicate: int) -> tuple[int, ...]:
    if processes % replicate:
        fitting = [str(n) for n in range(1, processes + 1) if processes % n == 0]
        raise InvalidRequest(
            f"strategy 'fsdp' was given replicate={replicate}, and the {processes} processes of "
            f"the run cannot be divided into {replicate} equal parts; write replicate={fitting[0]}"
            f"{''.join(f', {n}' for n in fitting[1:-1])} or {fitting[-1]}"
        )
    return (processes,) if replicate == 1 else (replicate, processes // replicate)


def _shares(part: nn.Module, module: nn.Module) -> bool:
    """Whether a parameter of ``part`` is one of a module outside of it too."""
    inside = set(part.modules())
    held = {id(parameter) for parameter in part.parameters()}
    return any(
        id(parameter) in held
        for each in module.modules()
        if each not in inside
        for parameter in each.parameters(recurse=False)
    )


def _checked(policy: Any) -> Any:
    """The policy, classes as a tuple. Raises ``InvalidRequest`` for what is none."""
    if policy is None or isinstance(policy, str):
        return policy
    if isinstance(policy, type):
        return (policy,)
    if callable(policy):
        return policy
    classes = tuple(policy) if isinstance(policy, Iterable) else ()
    if classes and all(isinstance(each, type) for each in classes):
        return classes
    raise InvalidRequest(
        f"strategy 'fsdp' was given policy={policy!r}; it takes names of classes joined by '+', "
        "such as policy=Block+Embedding, classes of modules, or a function of a module"
    )


def _chooser(policy: Any) -> Callable[[nn.Module], bool]:
    if isinstance(policy, str):
        names = {name.strip() for name in policy.split("+")}
        return lambda module: type(module).__name__ in names
    if isinstance(policy, tuple):
        return lambda module: isinstance(module, policy)
    function: Callable[[nn.Module], bool] = policy
    return function


def _local(tensor: Any) -> Any:
    """What this process holds of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(norm: Any) -> Tensor:
    """A norm over parts, as a plain number on the device."""
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def _part_of(value: Any, like: Any) -> Any:
    """This process's part of a whole tensor, as ``like`` is sharded; everything else as it is."""
    if not hasattr(like, "device_mesh") or not isinstance(value, Tensor):
        return value
    if hasattr(value, "device_mesh") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole; nothing need be sent.
    whole = value.detach().to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _as_sharded(state: Mapping[str, Any], parameter: Any) -> dict[str, Any]:
    return {key: _part_of(value, parameter) for key, value in state.items()}
