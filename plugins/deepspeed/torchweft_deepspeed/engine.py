"""One model and its optimizer in an engine of DeepSpeed: what came back, and what may come next."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.errors import IncompatiblePlan, InvalidRequest, Misuse
from torchweft_deepspeed.configuration import complete
from torchweft_deepspeed.holding import Holding, holding_of

__all__ = ["Engine", "only_optimizer"]


#: Of DeepSpeed's loss scalers.
_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine(nn.Module):
    """DeepSpeed's engine, told of micro-batches one by one; calling it calls the model.

    DeepSpeed puts parts of its own into the groups of the optimizer that it is given, so that it
    is given a twin, with the same options and no state; the user's keeps its groups. What it hangs
    on parameters would keep all of it for ever, and is taken off when nobody has this one any more.

    Attributes:
        live: DeepSpeed's own.
        module: the user's.
        stage: of ZeRO.
        optimizer: the user's; None where there is none.
        scales_loss: whether losses are scaled.
        expecting: whether a backward pass is under way that is DeepSpeed's to know of.
        touched: whether gradients came into the model in it.
    """

    live: Any
    module: nn.Module

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        config: Mapping[str, Any],
        blocks: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.module = module
        self.stage = int(config["zero_optimization"]["stage"])
        self.optimizer = optimizer
        self._splits = self.stage > 0 or bool(blocks)
        self.scales_loss = "fp16" in blocks
        self._inner = _twin(optimizer) if optimizer is not None and self._splits else optimizer
        size = sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())
        live = _initialize(module, self._inner, complete(config, blocks, size))
        # Not as a part of this module: the user's is one already.
        self.__dict__["live"] = live
        weakref.finalize(self, live.destroy).atexit = False
        self._check()
        self.holding: Holding = holding_of(self.live, self.stage)
        if self.stage == 0 and self._splits:
            self.holding.begin()
        self.expecting = self.touched = False
        self._pending = self._closed = False
        self._foreign_scale = False
        self._listen()

    def _check(self) -> None:
        made = self.live.optimizer
        if type(made).__name__ == "BF16_Optimizer":
            raise IncompatiblePlan(
                "strategy 'deepspeed' at stage 1 was given config= with 'data_types."
                "grad_accum_dtype' in 32-bit, for which DeepSpeed has an optimizer of its own that "
                "tells no norm before a step; write stage=2, or leave it out"
            )
        if hasattr(made, "fp32_groups_flat"):
            raise IncompatiblePlan(
                f"strategy 'deepspeed' at stage 0 was given {type(self.optimizer).__name__}, whose "
                "parameters DeepSpeed makes one tensor of in 16 bits; write stage=1, or use "
                "torch.optim.AdamW(…, fused=True)"
            )

    def _listen(self) -> None:
        """Have DeepSpeed's word that gradients come into the model passed on."""
        own, prologue = weakref.ref(self), self.live._backward_prologue

        def begin() -> None:
            engine = own()
            # What torch.autograd.grad computes is the user's own.
            if engine is None or not engine.expecting:
                return
            if not engine.touched:
                engine.touched = True
                engine.check_backward()
            prologue()

        self.live._backward_prologue = begin

    @property
    def is_whole(self) -> bool:
        """Whether optimizer and model are as the user made them."""
        return not self._splits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Through DeepSpeed."""
        return self.live(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The user's module, inside of DeepSpeed."""
        self.module.compile(*args, **kwargs)

    @property
    def loss_scale(self) -> float:
        """By which gradients are too large until the step."""
        return float(getattr(self.live.optimizer, "loss_scale", 1.0))

    def _scaler(self) -> Any:
        """What DeepSpeed counts overflows with; it is called by two names."""
        made = self.live.optimizer
        return getattr(made, "loss_scaler", None) or getattr(made, "loss_scale_config", None)

    def scaling(self) -> dict[str, Any]:
        """What the next loss scales depend on; empty where no loss is scaled."""
        if not self.scales_loss:
            return {}
        scaler = self._scaler()
        return {name: getattr(scaler, name) for name in _SCALING if hasattr(scaler, name)}

    def scale_as(self, state: Mapping[str, Any]) -> None:
        """Restore what ``scaling`` returned."""
        scaler = self._scaler()
        for name, value in state.items() if self.scales_loss else ():
            if name in _SCALING and hasattr(scaler, name):
                setattr(scaler, name, value)

    # -- a step, in its order ----------------------------------------------------------------------

    def check_backward(self) -> None:
        """Raise ``Misuse`` where a backward pass would take the place of one before."""
        if self.stage in (1, 2) and self._closed:
            raise Misuse(
                f"fabric.backward() came twice before optimizer.step(), and at stage {self.stage} "
                "DeepSpeed would forget the gradients of the first; put every micro-batch of a "
                "step into 'with fabric.accumulate(model, steps=…, index=…):', which says which "
                "of them is the last, or call optimizer.zero_grad() where they are to be forgotten"
            )
        if self.stage == 3:
            # Which of several passes this is DeepSpeed counts at each forward pass, and there may
            # have been none in between.
            self.live.optimizer.clear_backward_seen_flag()

    def backward(self, loss: Tensor, retain_graph: bool) -> None:
        """DeepSpeed's own backward pass, which reduces gradients too."""
        if self.stage == 0 and self.scales_loss:
            # Here DeepSpeed divides gradients by the scale, and does not multiply the loss.
            loss = loss * self.loss_scale
        self.live.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    def passed(self, scale: float) -> None:
        """Note that gradients came in, of a loss that was multiplied by ``scale``."""
        if self.stage > 0:
            # DeepSpeed counts one for each call of the model, and off one for each backward pass.
            self.live.optimizer._backward_active_depth = 0
        self._pending = True
        self._closed = bool(self.live.is_gradient_accumulation_boundary())
        self._foreign_scale |= scale != self.loss_scale

    def step(self) -> None:
        """Step, unless there is nothing to step with. Raises ``Misuse`` in the middle of one."""
        if not self._pending:
            return
        if not self._closed:
            raise Misuse(
                "optimizer.step() came behind micro-batches whose gradients are not synchronised "
                "between the processes; step where acc.should_step of fabric.accumulate() is true, "
                "or leave the last micro-batch of a step out of fabric.no_backward_sync()"
            )
        if self._foreign_scale:
            raise Misuse(
                "optimizer.step() came behind a loss that was scaled for another model; call "
                "fabric.backward(loss, model=model) with the model whose optimizer steps next, and "
                "optimizer.zero_grad() of the others before their own"
            )
        self.tell_options()
        self.live.step()
        self.hear_options()
        if self._splits:
            # Schedulers warn unless they see that a step came first.
            self.optimizer._opt_called = True  # type: ignore[union-attr]
        self._emptied()

    def forget(self) -> None:
        """Forget all gradients, also those that are reduced and divided, and how to clip them."""
        if not self._pending:
            self._clip(0.0)
            return
        made = self.live.optimizer
        if self.stage == 0:
            self.live.zero_grad()
        else:
            made.zero_grad(set_to_none=True)
            made.averaged_gradients = dict.fromkeys(made.averaged_gradients)
            if getattr(made, "cpu_offload", False) or getattr(made, "offload_optimizer", False):
                made.reset_cpu_buffers()
        if self.stage in (1, 2):
            # As DeepSpeed does where a step is left out.
            made.micro_step_id = -1
            made._release_preflattened_grad_buffers()
            made.all_grad_tensors = dict.fromkeys(made.all_grad_tensors)
            made._offload_accumulated_param_ids = set()
        elif self.stage == 3:
            made.grad_partitions_flat_buffer.zero_()
            made._offload_boundary_param_ids = set()
        self._emptied()

    def _emptied(self) -> None:
        self._pending = self._closed = self._foreign_scale = False
        self._clip(0.0)

    # -- clipping ----------------------------------------------------------------------------------

    def clip(self, max_norm: float) -> Tensor:
        """The norm of the true gradients; DeepSpeed scales them down when it steps."""
        if not self._closed:
            return torch.zeros((), device=self.live.device)
        norm = self._norm() / self.loss_scale
        self._clip(max_norm)
        return norm

    def _clip(self, max_norm: float) -> None:
        if self._splits and self.optimizer is not None:
            self.live.optimizer.clip_grad = max_norm

    def _norm(self) -> Tensor:
        made = self.live.optimizer
        if self.stage == 0:
            grads = [p.grad for group in made.fp16_groups for p in group if p.grad is not None]
            norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
            whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
            return whole
        if self.stage < 3:
            norm = made.scaled_global_norm()
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(made._get_norm_groups())
        norm = norm.to(device=self.live.device, dtype=torch.float32)
        # DeepSpeed's word for a norm that is not finite.
        return torch.where(norm < 0, torch.inf, norm)

    # -- the options of the optimizer, which a scheduler changes -----------------------------------

    def _groups(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The user's groups, each with the one that is stepped; those that train."""
        assert self.optimizer is not None
        mine = [g for g in self.optimizer.param_groups if any(p.requires_grad for p in g["params"])]
        stepped = self.holding.optimizer.param_groups
        if len(mine) != len(stepped):
            raise Misuse(
                f"{type(self.optimizer).__name__} has {len(mine)} groups of parameters that train, "
                f"and had {len(stepped)} when it was set up; DeepSpeed takes no others afterwards"
            )
        return list(zip(mine, stepped, strict=True))

    def tell_options(self) -> None:
        """Give the groups that are stepped the options of the user's."""
        if self._splits:
            for mine, stepped in self._groups():
                stepped.update((key, mine[key]) for key in mine if key != "params")

    def hear_options(self, but: Collection[str] = ()) -> None:
        """Give the user's groups the options of those that are stepped, ``but`` for some."""
        if self._splits:
            for mine, stepped in self._groups():
                mine.update((key, stepped[key]) for key in mine if key not in ("params", *but))


def only_optimizer(module: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer | None:
    """The one of the model, if there is one.

    Raises ``InvalidRequest`` for several, and for one that is not the model's alone.
    """
    if not optimizers:
        return None
    if len(optimizers) > 1:
        names = " and ".join(type(each).__name__ for each in optimizers)
        raise InvalidRequest(
            f"fabric.setup() was given {len(optimizers)} optimizers ({names}) for one "
            f"{type(module).__name__}, and DeepSpeed has one for a model; make one optimizer "
            "with several groups of parameters, or models of the parts"
        )
    owned = {id(parameter) for parameter in module.parameters()}
    held = [p for group in optimizers[0].param_groups for p in group["params"]]
    foreign = [parameter for parameter in held if id(parameter) not in owned]
    if foreign:
        raise InvalidRequest(
            f"{type(optimizers[0]).__name__} holds {len(foreign)} parameter(s) that are not "
            f"of the {type(module).__name__}, and DeepSpeed has an optimizer for each model; "
            "make one for each"
        )
    if not any(parameter.requires_grad for parameter in held):
        raise InvalidRequest(
            f"{type(optimizers[0]).__name__} holds no parameter that trains; leave it out of "
            "fabric.setup()"
        )
    return optimizers[0]


def _twin(optimizer: Optimizer) -> Optimizer:
    """One of the same class and options for the parameters that train, without state."""
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    # What a scheduler put around the step of the user's.
    twin.__dict__.pop("step", None)
    groups = [
        {**group, "params": [p for p in group["params"] if p.requires_grad]}
        for group in optimizer.param_groups
    ]
    twin.param_groups = [group for group in groups if group["params"]]
    twin.state = defaultdict(dict)
    return twin


def _initialize(module: nn.Module, optimizer: Optimizer | None, config: dict[str, Any]) -> Any:
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    import deepspeed

    try:
        live, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
    except ZeRORuntimeException as error:
        if "ZeRO-Offload" not in str(error):
            raise
        raise InvalidRequest(
            f"strategy 'deepspeed' offloads the optimizer, and {type(optimizer).__name__} would "
            "step slowly on the host; write "
            "deepspeed.ops.adam.DeepSpeedCPUAdam(model.parameters(), …) in its place, or "
            "zero_force_ds_cpu_optimizer=false to step all the same"
        ) from error
    return live
