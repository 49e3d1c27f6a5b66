"""DistributedDataParallel: a copy of the model per process, gradients averaged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torchweft.api import DistributedStrategy, Place, Prepared
from torchweft.errors import IncompatiblePlan, InvalidRequest, did_you_mean

__all__ = ["DDPStrategy"]


class DDPStrategy(DistributedStrategy):
    """A copy of the model in every process; gradients are averaged during ``backward``.

    PyTorch Distributed: Li et al., 2020 (arXiv:2006.15704). Works between GPUs (nccl) and between
    CPU processes (gloo). Keywords that are not listed are those of
    ``torch.nn.parallel.DistributedDataParallel``, with torch's defaults unless said otherwise.

    Args:
        gradient_as_bucket_view: gradients share memory with the buckets that are sent; on by
            default, it saves a copy and the memory of all gradients.
        bucket_cap_mb_list: MiB of each bucket, in their order; of newer versions of torch.
        batched_grad_copy: gradients are copied to a bucket together, when it is complete; of newer
            versions of torch.
        forward_sync_buffers: rank 0's buffers are sent at every ``forward``; from torch 2.13 on it
            takes the place of ``broadcast_buffers``.
        process_group_backend: name of the ``torch.distributed`` backend; None: the accelerator's.
        timeout: seconds that a collective may take before the run is given up.
        ddp_comm_state: state for ``ddp_comm_hook``.
        ddp_comm_hook: a gradient compression hook, as ``register_comm_hook`` takes it.
    """

    name = "ddp"
    devices = ("cuda", "cpu")
    replicas_stay_equal = True

    def __init__(
        self,
        *,
        device_ids: list[int] | None = None,
        output_device: int | None = None,
        dim: int = 0,
        broadcast_buffers: bool | None = None,
        init_sync: bool = True,
        process_group: Any = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
        delay_all_reduce_named_params: Any = None,
        param_to_hook_all_reduce: Any = None,
        mixed_precision: Any = None,
        device_mesh: Any = None,
        skip_all_reduce_unused_params: bool = False,
        bucket_cap_mb_list: list[int] | None = None,
        batched_grad_copy: bool = False,
        forward_sync_buffers: bool | None = None,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
        ddp_comm_state: Any = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _PARAMETERS}
        # What has torch's own default is not passed, so that an older torch without that keyword
        # works until somebody asks for it.
        self._keywords = {
            name: value for name, value in given.items() if value != _PARAMETERS[name]
        }
        self._keywords["gradient_as_bucket_view"] = gradient_as_bucket_view
        self._check_keywords()
        _check_backend(process_group_backend)
        self._backend = process_group_backend
        self.timeout = timeout
        self._comm_hook = (ddp_comm_state, ddp_comm_hook)
        if not find_unused_parameters:
            self.cannot = {
                "unused_parameters": "DistributedDataParallel waits for the gradient of every "
                "parameter; write strategy='ddp:find_unused_parameters=true'"
            }

    def _check_keywords(self) -> None:
        known = inspect.signature(DistributedDataParallel).parameters
        for name in self._keywords:
            if name not in known:
                raise IncompatiblePlan(
                    f"strategy 'ddp' was given {name}=, which DistributedDataParallel of torch "
                    f"{torch.__version__} does not have; leave it out, or use another torch"
                )

    def backend(self, place: Place) -> str:
        """The one that was named, or the accelerator's."""
        return self._backend or super().backend(place)

    # -- setup -----------------------------------------------------------------------------------

    def setup(self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any) -> Prepared:
        """Wrap the module; a module without parameters that train stays as it is."""
        if any(parameter.requires_grad for parameter in module.parameters()):
            device = self.place.device
            # Modules on the host take no device ids.
            here = {"device_ids": [device.index]} if device.index is not None else {}
            wrapped = DistributedDataParallel(module, **{**here, **self._keywords})
            state, hook = self._comm_hook
            if hook is not None:
                wrapped.register_comm_hook(state, hook)
            module = wrapped
        return Prepared(module=module, optimizers=list(optimizers), scheduler=scheduler)

    def original(self, module: nn.Module) -> nn.Module:
        """The user's module inside."""
        return module.module if isinstance(module, DistributedDataParallel) else module

    # -- the step --------------------------------------------------------------------------------

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """``no_sync`` for every micro-batch but the last of a step."""
        if last or not isinstance(module, DistributedDataParallel):
            return nullcontext()
        context: AbstractContextManager[Any] = module.no_sync()
        return context

    def forward_method(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """The method, called where DistributedDataParallel calls ``forward``."""
        if not isinstance(module, DistributedDataParallel):
            return super().forward_method(module, name)
        return partial(_call_in_place_of_forward, module, name)


def _call_in_place_of_forward(
    wrapped: DistributedDataParallel, name: str, *args: Any, **kwargs: Any
) -> Any:
    own = vars(wrapped.module)
    method = getattr(wrapped.module, name)
    # An attribute of the object comes before the method of its class; it may have one already.
    before = {"forward": own["forward"]} if "forward" in own else {}

    def restore() -> None:
        own.pop("forward", None)
        own.update(before)

    def instead(*args: Any, **kwargs: Any) -> Any:
        # At once, so that the method may itself call forward.
        restore()
        return method(*args, **kwargs)

    own["forward"] = instead
    try:
        return wrapped(*args, **kwargs)
    finally:
        restore()


def _check_backend(backend: str | None) -> None:
    """Whether torch knows every name in ``"gloo"`` or ``"cpu:gloo,cuda:nccl"``."""
    known = [name for name in dist.Backend.backend_list if name != dist.Backend.UNDEFINED]
    for part in backend.split(",") if backend else ():
        name = part.rpartition(":")[2].strip().lower()
        if name not in known:
            raise InvalidRequest(
                f"strategy 'ddp' was given process_group_backend='{backend}', and "
                f"torch.distributed knows no backend '{name}'"
                f"{did_you_mean(name, known) or ';'} it knows {', '.join(known)}"
            )


_PARAMETERS = {
    name: parameter.default
    for name, parameter in inspect.signature(DDPStrategy).parameters.items()
    if name not in ("process_group_backend", "timeout", "ddp_comm_state", "ddp_comm_hook")
}
