"""Making models and optimizers ready for a strategy, each once and in an order that is right."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.api import Run
from torchweft.callbacks import Callbacks
from torchweft.errors import InvalidRequest, Misuse
from torchweft.wrappers import FabricModule, FabricOptimizer, wrap_optimizer
from torchweft.wrappers.module import split_compiled
from torchweft.wrappers.optimizer import AfterStep

__all__ = ["Setups", "check_can", "set_up_module", "set_up_optimizer"]


class Setups:
    """What was set up in this process, and what can still be.

    Args:
        run: the live run.
        backward_open: a cell that is true during ``fabric.backward()``.
        callbacks: heard after every step, where one of them wants to be.
    """

    def __init__(self, run: Run, backward_open: list[bool], callbacks: Callbacks) -> None:
        self._run = run
        self._after_step: AfterStep | None = None
        if callbacks.listens("on_after_optimizer_step"):
            self._after_step = lambda optimizer: callbacks.call(
                "on_after_optimizer_step", strategy=run.strategy, optimizer=optimizer
            )
        self._backward_open = backward_open
        # In the order in which they were set up, which decides names in checkpoints.
        self._modules: weakref.WeakKeyDictionary[FabricModule, None] = weakref.WeakKeyDictionary()
        self._originals: weakref.WeakSet[Any] = weakref.WeakSet()

    def setup(
        self,
        module: nn.Module,
        optimizers: tuple[Optimizer, ...],
        scheduler: Any,
        move_to_device: bool,
        reapply_compile: bool,
    ) -> Any:
        """``fabric.setup``: what was given, ready, in the same order."""
        self._check_module(module, "setup()")
        for optimizer in optimizers:
            self._check_optimizer(optimizer, "setup()")
            self._check_owner(module, optimizer)
        model, prepared = self._prepare(
            module, optimizers, scheduler, move_to_device, reapply_compile
        )
        wrapped = [self._wrap(optimizer) for optimizer in prepared.optimizers]
        if not wrapped and scheduler is None:
            return model
        return (model, *wrapped, *([] if scheduler is None else [prepared.scheduler]))

    def setup_module(
        self, module: nn.Module, move_to_device: bool, reapply_compile: bool
    ) -> FabricModule:
        """``fabric.setup_module``."""
        self._check_apart()
        self._check_module(module, "setup_module()")
        return self._prepare(module, (), None, move_to_device, reapply_compile)[0]

    def setup_optimizers(self, optimizers: Sequence[Optimizer]) -> tuple[Any, ...]:
        """``fabric.setup_optimizers``."""
        run = self._run
        self._check_apart()
        if not optimizers:
            raise InvalidRequest("fabric.setup_optimizers() was called without an optimizer")
        for optimizer in optimizers:
            self._check_optimizer(optimizer, "setup_optimizers()")
        # Where setup_module replaced parameters, the strategy puts the new ones into groups first.
        prepared = [run.strategy.setup_optimizer(optimizer) for optimizer in optimizers]
        for ready in prepared:
            self._check_owner(None, ready)
        self._originals.update(optimizers)
        return tuple(self._wrap(ready) for ready in prepared)

    def _wrap(self, optimizer: Optimizer) -> Any:
        run = self._run
        owners = self._owners(optimizer)
        return wrap_optimizer(optimizer, run.strategy, owners, run.precision, self._after_step)

    def _prepare(
        self,
        module: nn.Module,
        optimizers: tuple[Optimizer, ...],
        scheduler: Any,
        move_to_device: bool,
        reapply_compile: bool,
    ) -> tuple[FabricModule, Any]:
        run = self._run
        inside, compile_again = split_compiled(module)
        if not reapply_compile:
            inside, compile_again = module, lambda prepared: prepared
        converted = run.precision.convert_module(inside)
        if move_to_device:
            converted = run.strategy.move_module(converted)
        for optimizer in optimizers:
            _follow_parameters(optimizer)
        prepared = run.strategy.setup(converted, optimizers, scheduler)
        wrapped = FabricModule(
            run.strategy.original(prepared.module),
            prepared.module,
            run.strategy,
            run.precision,
            self._backward_open,
            compile_again(prepared.module),
        )
        self._modules[wrapped] = None
        self._originals.update((module, inside, *optimizers))
        return wrapped, prepared

    def _owners(self, optimizer: Optimizer) -> list[nn.Module]:
        held = _parameters_of(optimizer)
        return [m.prepared for m in self._modules if any(id(p) in held for p in m.parameters())]

    # -- checks ----------------------------------------------------------------------------------

    def _check_apart(self) -> None:
        reason = self._run.strategy.cannot.get("setup_apart")
        if reason:
            raise Misuse(
                f"strategy '{self._run.plan.strategy.name}' cannot set up a model and its "
                f"optimizer apart: {reason}; use fabric.setup(model, optimizer)"
            )

    def _check_module(self, module: Any, caller: str) -> None:
        if not isinstance(module, nn.Module):
            raise InvalidRequest(
                f"fabric.{caller} was given {_described(module)} where the model belongs; write "
                "fabric.setup(model, optimizer)"
            )
        if isinstance(module, FabricModule) or module in self._originals:
            raise Misuse(
                f"this {_name(module)} was already set up; use what fabric.setup() returned, "
                "and set every model up once"
            )
        if len(self._modules):
            check_can(self._run, "several_modules", "set up a second model")

    def _check_optimizer(self, optimizer: Any, caller: str) -> None:
        if isinstance(optimizer, FabricOptimizer) or optimizer in self._originals:
            raise Misuse(
                f"this {_name(optimizer)} was already set up; use what fabric.setup() returned, "
                "and set every optimizer up once"
            )
        if not isinstance(optimizer, Optimizer):
            raise InvalidRequest(
                f"fabric.{caller} was given {_described(optimizer)} where an optimizer belongs; "
                "optimizers are passed one by one, and a scheduler as scheduler="
            )

    def _check_owner(self, module: nn.Module | None, optimizer: Optimizer) -> None:
        """Whether the models that are set up by then hold the optimizer's parameters."""
        models = [*self._modules, *([] if module is None else [module])]
        owned = {id(parameter) for model in models for parameter in model.parameters()}
        mine = owned if module is None else {id(parameter) for parameter in module.parameters()}
        held = _parameters_of(optimizer)
        if held and not mine.intersection(held):
            what = "a model that was set up" if module is None else _name(module)
            raise InvalidRequest(
                f"{_name(optimizer)} holds no parameter of {what}; make the optimizer from the "
                "parameters of the model, and set up the model with it or before it"
            )
        foreign = [parameter for key, parameter in held.items() if key not in owned]
        # Alone, nobody has to synchronise them.
        if foreign and self._run.rank.world_size > 1:
            raise InvalidRequest(
                f"{_name(optimizer)} holds {len(foreign)} parameter(s) that belong to no model "
                f"that was set up, the first of shape {tuple(foreign[0].shape)}; their gradients "
                "would differ between the processes: make them part of the model, or set up their "
                "model before"
            )


def check_can(run: Run, capability: str, what: str) -> None:
    """Raise ``Misuse``, with the strategy's own reason, where it cannot do ``what``."""
    reason = run.strategy.cannot.get(capability)
    if reason:
        raise Misuse(f"strategy '{run.plan.strategy.name}' cannot {what}: {reason}")


def set_up_module(value: Any, caller: str) -> FabricModule:
    """``value``, which has to be a model that ``setup`` returned."""
    if not isinstance(value, FabricModule):
        raise _not_set_up(value, caller)
    return value


def set_up_optimizer(value: Any, caller: str) -> FabricOptimizer:
    """``value``, which has to be an optimizer that ``setup`` returned."""
    if not isinstance(value, FabricOptimizer):
        raise _not_set_up(value, caller)
    return value


def _not_set_up(value: Any, caller: str) -> Misuse:
    return Misuse(
        f"fabric.{caller} was given a {type(value).__name__} that was not set up; pass what "
        "fabric.setup() returned"
    )


def _parameters_of(optimizer: Optimizer) -> dict[int, Tensor]:
    return {id(p): p for group in optimizer.param_groups for p in group["params"]}


def _follow_parameters(optimizer: Optimizer) -> None:
    """Bring the state of an optimizer, where there is one already, to where parameters went."""
    for parameter, state in optimizer.state.items():
        for value in state.values():
            # Single numbers stay on the host, as torch has them.
            if isinstance(value, Tensor) and value.numel() > 1 and not _alike(value, parameter):
                # torch's own rules for which parts of a state go along.
                optimizer.load_state_dict(optimizer.state_dict())
                return


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and (one.dtype == other.dtype or not one.is_floating_point())


def _name(value: Any) -> str:
    """A class's own name, and of everything else that of its class."""
    return str(getattr(value, "__name__", None) or type(value).__name__)


def _described(value: Any) -> str:
    cls = type(value).__name__
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {cls}"
