"""DeepSpeed ZeRO: optimizer state, gradients and parameters split between processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.api import DistributedStrategy, Place, Prepared
from torchweft.api.activations import checkpoint_activations
from torchweft.api.choosing import Choice, check_choice, chosen_by
from torchweft.api.initialising import SkipInit
from torchweft.errors import IncompatiblePlan, InvalidRequest
from torchweft_deepspeed import library
from torchweft_deepspeed.activations import compute_alike
from torchweft_deepspeed.configuration import check_known
from torchweft_deepspeed.engine import Engine, only_optimizer
from torchweft_deepspeed.engines import Engines
from torchweft_deepspeed.folder import Layout
from torchweft_deepspeed.precision import precision_of
from torchweft_deepspeed.requests import check_drive, merged, objections, of_one_model, stage_of
from torchweft_deepspeed.sending import send, send_buffers_before
from torchweft_deepspeed.state import (
    load_module,
    load_optimizer,
    module_state,
    optimizer_state,
    take_state,
)

__all__ = ["DeepSpeedStrategy"]

#: The option that chooses modules.
_AGAIN = "activation_checkpointing"


class DeepSpeedStrategy(DistributedStrategy):
    """ZeRO: what a process need not have is divided between all of them.

    Rajbhandari et al., 2020 (arXiv:1910.02054). Works between GPUs (nccl) and between CPU processes
    (gloo). Options that are left out have DeepSpeed's own defaults, or what ``config`` says.

    Args:
        stage: what is divided: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 parameters
            too. 2, unless ``config`` says otherwise.
        offload_optimizer: where the optimizer's state is, and the step is computed by the host:
            in its memory (``"cpu"``) or on a drive (``"nvme"``, stage 3).
        offload_parameters: the same of parameters, at stage 3.
        nvme_path: the folder for what is offloaded to a drive.
        reduce_bucket_size: elements of gradients that are reduced together; by default no more
            than the model has, at stage 3 than a quarter of what a process has of it.
        allgather_bucket_size: elements of parameters that are gathered together.
        allgather_partitions: gather parameters behind a step, in place of sending them one by one.
        overlap_comm: reduce gradients while others are computed.
        contiguous_gradients: copy gradients to one buffer as they come.
        reduce_scatter: reduce gradients to the process that needs them.
        round_robin_gradients: divide gradients by turns, which is faster with offloading.
        sub_group_size: elements of parameters that are stepped together, at stage 3.
        stage3_prefetch_bucket_size: elements that are gathered ahead of their use.
        stage3_param_persistence_threshold: parameters of fewer elements stay whole.
        stage3_max_live_parameters: elements that are whole at a time.
        stage3_max_reuse_distance: what is used again within so many elements stays whole.
        zero_hpz_partition_size: processes that have a second copy of parameters between them.
        zero_quantized_weights: gather parameters in 8 bits.
        zero_quantized_gradients: reduce gradients in 8 bits.
        zero_allow_untested_optimizer: take optimizers that DeepSpeed has no tests of; on.
        zero_force_ds_cpu_optimizer: with an offloaded optimizer, take DeepSpeed's own alone.
        activation_checkpointing: which modules compute their forward pass again in the backward
            pass, in place of keeping what they computed: names of classes joined by ``"+"``,
            classes, or a function of a module. By torch's ``checkpoint``.
        partition_activations: for ``deepspeed.checkpointing.checkpoint`` in the model: divide what
            it keeps between processes that have one model together. There are none here, so that
            it is refused.
        cpu_checkpointing: for the same: keep it in the host's memory.
        contiguous_memory_optimization: for the same: keep it in one buffer, once it is divided.
        synchronize_checkpoint_boundary: for the same: wait for the device at each.
        number_checkpoints: for the same: how many there are in the model.
        config: the rest of DeepSpeed's configuration, a dict or the path of a JSON file.
        broadcast_buffers: rank 0's buffers are sent at every ``forward``.
        verbose: let DeepSpeed log more than warnings.
        timeout: seconds that a collective may take before the run is given up.
    """

    name = "deepspeed"
    devices = ("cuda", "cpu")
    owns_backward = True
    cannot: Mapping[str, str] = {
        "setup_apart": "DeepSpeed makes model and optimizer ready together",
        "clip_by_value": "DeepSpeed clips by the global norm alone; give max_norm in place of "
        "clip_val",
        "unused_parameters": "DeepSpeed takes a parameter without a gradient for one whose "
        "gradient is zero, so that momentum and weight decay change it; use strategy "
        "'ddp:find_unused_parameters=true', or keep such parameters out of the optimizer",
    }

    def __init__(
        self,
        *,
        stage: Literal[0, 1, 2, 3] | None = None,
        offload_optimizer: Literal["none", "cpu", "nvme"] | None = None,
        offload_parameters: Literal["none", "cpu", "nvme"] | None = None,
        nvme_path: str | None = None,
        reduce_bucket_size: int | None = None,
        allgather_bucket_size: int | None = None,
        allgather_partitions: bool | None = None,
        overlap_comm: bool | None = None,
        contiguous_gradients: bool | None = None,
        reduce_scatter: bool | None = None,
        round_robin_gradients: bool | None = None,
        sub_group_size: int | None = None,
        stage3_prefetch_bucket_size: int | None = None,
        stage3_param_persistence_threshold: int | None = None,
        stage3_max_live_parameters: int | None = None,
        stage3_max_reuse_distance: int | None = None,
        zero_hpz_partition_size: int | None = None,
        zero_quantized_weights: bool | None = None,
        zero_quantized_gradients: bool | None = None,
        zero_allow_untested_optimizer: bool | None = None,
        zero_force_ds_cpu_optimizer: bool | None = None,
        activation_checkpointing: Choice = None,
        partition_activations: bool | None = None,
        cpu_checkpointing: bool | None = None,
        contiguous_memory_optimization: bool | None = None,
        synchronize_checkpoint_boundary: bool | None = None,
        number_checkpoints: int | None = None,
        config: Mapping[str, Any] | str | None = None,
        broadcast_buffers: bool = True,
        verbose: bool = False,
        timeout: float = 1800.0,
    ) -> None:
        given = dict(locals())
        own = ("self", "__class__", _AGAIN, "broadcast_buffers", "verbose", "timeout")
        self._options = {name: value for name, value in given.items() if name not in own}
        # A file is read where the strategy starts; everything else can be said now.
        if not isinstance(config, str):
            for sentence in objections(self._options):
                raise InvalidRequest(sentence)
        self._checkpointed = check_choice("deepspeed", _AGAIN, activation_checkpointing)
        self._broadcast_buffers = broadcast_buffers
        self._verbose = verbose
        self.timeout = timeout

    # -- life --------------------------------------------------------------------------------------

    def start(self, place: Place) -> None:
        """Join the process group, and have DeepSpeed use it."""
        for sentence in objections(self._options, place.device.type):
            raise InvalidRequest(sentence)
        self._config = merged(self._options)
        self.stage = stage_of(self._config)
        check_drive(self._config)
        self._deepspeed = library.load(place.device.type)
        check_known(self._config)
        self._precision = precision_of(place)
        self._blocks = self._precision.config()
        super().start(place)
        library.join(place.rank.local_rank, self._verbose)
        # Parts of what the class says are a matter of the stage.
        self.splits_parameters = self.stage == 3
        self.splits_optimizer = self.stage > 0 or bool(self._blocks)
        self._engines = Engines()
        self._numbers = count()
        compute_alike(place.device.type)
        if "activation_checkpointing" in self._config:
            config = self._complete(self._config, 0)
            self._deepspeed.checkpointing.configure(mpu_=None, deepspeed_config=config)

    def _complete(self, config: Mapping[str, Any], size: int) -> dict[str, Any]:
        from torchweft_deepspeed.configuration import complete

        return complete(config, self._blocks, size)

    def _of_next_model(self) -> dict[str, Any]:
        return of_one_model(self._config, next(self._numbers))

    # -- setup -------------------------------------------------------------------------------------

    @contextmanager
    def init_context(self, empty: bool | None = None) -> Iterator[None]:
        """At stage 3 every parameter is divided as soon as the module that has it is made."""
        if self.stage < 3:
            with super().init_context(empty):
                yield
            return
        with ExitStack() as stack:
            stack.enter_context(self.tensor_context())
            zero = self._deepspeed.zero
            config = self._complete(self._of_next_model(), 2**62)
            stack.enter_context(zero.Init(config_dict_or_path=config))
            stack.enter_context(SkipInit() if empty else nullcontext())
            yield

    def move_module(self, module: nn.Module) -> nn.Module:
        """A module on the device; what DeepSpeed divided as it was made is there already."""
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.place.device)
            return module
        return super().move_module(module)

    def setup(self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any) -> Prepared:
        """An engine of DeepSpeed around the module; a scheduler stays the user's to step."""
        optimizer = only_optimizer(module, optimizers)
        self._check_drive(optimizer)
        for each in chosen_by(module, "deepspeed", _AGAIN, self._checkpointed):
            checkpoint_activations(each)
        send(module.buffers())
        prepared = module
        if optimizer is None and self.stage < 3:
            # Nothing trains, and everybody has all of it.
            send(module.parameters())
        else:
            engine = Engine(module, optimizer, self._of_next_model(), self._blocks)
            self._precision.enter(module)
            prepared = engine
            self._engines.add(engine)
            if optimizer is not None and optimizer.state and not engine.is_whole:
                take_state(engine, optimizer, [module])
        if self._broadcast_buffers:
            send_buffers_before(prepared, module)
        return Prepared(module=prepared, optimizers=list(optimizers), scheduler=scheduler)

    def _check_drive(self, optimizer: Optimizer | None) -> None:
        away = self._config["zero_optimization"].get("offload_optimizer", {}).get("device")
        if away == "nvme" and isinstance(optimizer, torch.optim.Adagrad):
            raise IncompatiblePlan(
                "strategy 'deepspeed' was asked for offload_optimizer='nvme', and the state that "
                f"{type(optimizer).__name__} starts with is made by DeepSpeed when the parameters "
                "are on the drive already, so that it is empty; write offload_optimizer='cpu', or "
                "use torch.optim.AdamW"
            )

    def original(self, module: nn.Module) -> nn.Module:
        """The module inside the engine."""
        engine = self._engines.get(module)
        return module if engine is None else engine.module

    def forward_method(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """The method, run in the place of ``forward``, so that DeepSpeed sees it begin and end."""
        original = self.original(module)
        method = getattr(original, name)
        if original is module:
            return super().forward_method(module, name)

        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            def instead(*args: Any, **kwargs: Any) -> Any:
                # What the method calls is the module's own again.
                del original.forward
                return method(*args, **kwargs)

            original.forward = instead
            try:
                return module(*args, **kwargs)
            finally:
                original.__dict__.pop("forward", None)

        return run

    # -- the step ----------------------------------------------------------------------------------

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """By the engine of the model that the loss came from, which also scales it.

        Gradients that come to further models on the way are reduced too.
        """
        retain = bool(kwargs.pop("retain_graph", False))
        if args or any(value for value in kwargs.values()) or loss.numel() != 1:
            raise InvalidRequest(
                "fabric.backward(loss) takes a single number and retain_graph= with strategy "
                "'deepspeed', whose engine calls loss.backward() itself; reduce the loss to one "
                "number"
            )
        self._engines.backward(loss, module, retain)

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Tell the engine which micro-batch closes the step."""
        engine = self._engines.get(module)
        if engine is None:
            yield
            return
        engine.live.set_gradient_accumulation_boundary(last)
        try:
            yield
        finally:
            engine.live.set_gradient_accumulation_boundary(True)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """By the engine; nothing, where no gradients came in."""
        if closure is not None:
            raise IncompatiblePlan(
                "optimizer.step(closure) was called, and the engine of strategy 'deepspeed' steps "
                "without one; call fabric.backward(loss) and then optimizer.step()"
            )
        self._engines.of(optimizer).step()

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        """Forget gradients, wherever DeepSpeed has them."""
        self._engines.of(optimizer).forget()

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
        """By the norm of all gradients of all processes; DeepSpeed scales them when it steps."""
        if norm_type != 2.0:
            raise InvalidRequest(
                f"fabric.clip_gradients(norm_type={norm_type}): DeepSpeed clips by the norm of "
                "order 2"
            )
        assert max_norm is not None
        engine = self._engines.of(optimizer)
        if engine.is_whole:
            return super().clip(
                module, optimizer, max_norm=max_norm, error_if_nonfinite=error_if_nonfinite
            )
        norm = engine.clip(max_norm)
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"the total norm of order 2 of the gradients is {norm.item()}, so that they cannot "
                "be clipped; pass error_if_nonfinite=False to go on all the same"
            )
        return norm

    # -- state -------------------------------------------------------------------------------------

    def module_state(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Parameters in 32-bit, gathered one at a time, with values in rank 0."""
        engine = self._engines.get(module)
        if engine is None or engine.is_whole:
            yield from super().module_state(module)
        else:
            yield from module_state(engine, self.original(module), self.place.rank.rank == 0)

    def load_module_state(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Each process takes its parts."""
        engine = self._engines.get(module)
        if engine is None or engine.is_whole:
            super().load_module_state(module, state, strict)
        else:
            load_module(engine, self.original(module), state, strict)

    def optimizer_state(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> dict[str, Any]:
        """Gathered one tensor at a time, with values in rank 0."""
        engine = self._engines.of(optimizer)
        if engine.is_whole:
            return super().optimizer_state(optimizer, modules)
        module = engine.module
        return optimizer_state(engine, optimizer, module, self.place.rank.rank == 0)

    def load_optimizer_state(
        self, optimizer: Optimizer, modules: Sequence[nn.Module], state: Mapping[str, Any]
    ) -> None:
        """Each process takes its parts."""
        engine = self._engines.of(optimizer)
        if engine.is_whole:
            super().load_optimizer_state(optimizer, modules, state)
        else:
            load_optimizer(engine, optimizer, [engine.module], state)

    @property
    def folder_layout(self) -> Layout:
        """DeepSpeed's own, for a model and its optimizer at stages 1 to 3."""
        return Layout(self._engines, self.original)

    def extra_state(self) -> dict[str, Any]:
        """The loss scale of every model, in the order in which they were set up."""
        scales = [engine.scaling() for engine in self._engines.all()]
        return {"deepspeed": scales} if any(scales) else {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Those of as many models."""
        for engine, scale in zip(self._engines.all(), state.get("deepspeed", []), strict=False):
            engine.scale_as(scale)
