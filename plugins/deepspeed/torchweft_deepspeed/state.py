"""Checkpoints of models and optimizers, as every strategy reads and writes them.

What is divided between processes is gathered tensor by tensor, and kept by rank 0 alone: the others
have a tensor without memory in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.api.state import (
    load_named_module_state,
    load_named_optimizer_state,
    named_module_state,
    parameter_names,
)
from torchweft.errors import CheckpointError
from torchweft_deepspeed.engine import Engine

__all__ = ["load_module", "load_optimizer", "module_state", "optimizer_state"]


def module_state(engine: Engine, module: nn.Module, keep: bool) -> Iterator[tuple[str, Any]]:
    """``(name, value)`` by the module's own names; ``keep``: whether this process has values."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    times = Counter(id(parameter) for parameter in parameters.values())
    # One that has several names is one tensor in the checkpoint too.
    shared: dict[int, Tensor] = {}
    for raw, (name, value) in zip(module.state_dict(), named_module_state(module), strict=True):
        parameter = parameters.get(raw)
        if parameter is None:
            yield name, value
            continue
        whole = shared.get(id(parameter))
        if whole is None:
            whole = _kept(engine.holding.full(parameter), parameter, keep)
            if times[id(parameter)] > 1:
                shared[id(parameter)] = whole
        yield name, whole


def optimizer_state(
    engine: Engine, optimizer: Optimizer, module: nn.Module, keep: bool
) -> dict[str, Any]:
    """``{"state": {name: …}, "param_groups": […]}``."""
    holding, names = engine.holding, parameter_names([module])
    holding.link()
    state: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            slots = holding.slots(parameter) if holding.has(parameter) else {}
            if slots:
                state[names[id(parameter)]] = {
                    key: _kept(holding.full_slot(parameter, key), parameter, keep)
                    if holding.is_divided(parameter, value)
                    else _own_copy(value)
                    for key, value in slots.items()
                }
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


def _own_copy(value: Any) -> Any:
    # DeepSpeed has one counter for many parameters, which elsewhere each counts for itself.
    return value.clone() if isinstance(value, Tensor) else value


def _kept(whole: Tensor, parameter: Any, keep: bool) -> Tensor:
    # What is no copy takes no memory, and may be written from anywhere.
    if whole.data_ptr() == parameter.data_ptr() and whole.numel():
        return whole
    return whole.cpu() if keep else torch.empty_like(whole, device="meta")


# -- loading ---------------------------------------------------------------------------------------


def load_module(engine: Engine, module: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
    """Fill the module, and what DeepSpeed holds of it in 32-bit."""
    _check_shapes(module, state)
    with _gathering(module):
        load_named_module_state(module, state, strict)
    names = _all_names(module)
    with torch.no_grad():
        for parameter in module.parameters():
            if not engine.holding.has(parameter):
                continue
            value = next((state[n] for n in names[id(parameter)] if n in state), None)
            if value is not None:
                engine.holding.fill(parameter, value.to(parameter.device, torch.float32))
    engine.forget()


def _all_names(module: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for raw, (name, _) in zip(module.state_dict(), named_module_state(module), strict=True):
        if raw in parameters:
            names.setdefault(id(parameters[raw]), []).append(name)
    return names


def _check_shapes(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Of parameters that are divided, which torch cannot compare."""
    names = _all_names(module)
    unlike = [
        f"'{name}' is {tuple(state[name].shape)} in the checkpoint and {tuple(shape)} in the model"
        for parameter in module.parameters()
        if (shape := getattr(parameter, "ds_shape", None)) is not None
        for name in names[id(parameter)]
        if isinstance(state.get(name), Tensor) and state[name].shape != shape
    ]
    if unlike:
        raise CheckpointError(f"the checkpoint is of another model: {', '.join(unlike)}")


@contextmanager
def _gathering(module: nn.Module) -> Iterator[None]:
    """Parameters are whole while the module that they belong to loads its own."""
    divided = [each for each in module.modules() if any(hasattr(p, "ds_id") for p in _own(each))]
    with ExitStack() as stack:
        for each in divided:
            each._load_from_state_dict = _whole_while(each)  # type: ignore[method-assign]
            stack.callback(each.__dict__.pop, "_load_from_state_dict")
        yield


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _whole_while(module: nn.Module) -> Any:
    load = module._load_from_state_dict

    def loading(*args: Any, **kwargs: Any) -> None:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters(_own(module), modifier_rank=0):
            load(*args, **kwargs)

    return loading


class _Held:
    """A tensor on its way to where DeepSpeed has it, which torch is not to copy or convert."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def load_optimizer(
    engine: Engine, optimizer: Optimizer, modules: Sequence[nn.Module], state: Mapping[str, Any]
) -> None:
    """Restore what ``optimizer_state`` returned, or a state keyed by index."""
    load_named_optimizer_state(optimizer, modules, _with_held(state))
    take_state(engine, optimizer, modules)
    engine.forget()


def take_state(engine: Engine, optimizer: Optimizer, modules: Sequence[nn.Module]) -> None:
    """Move the state that the user's optimizer has to where DeepSpeed steps."""
    states: dict[Any, dict[str, Any]] = {
        parameter: {
            key: value.tensor if isinstance(value, _Held) else value for key, value in slots.items()
        }
        for parameter, slots in optimizer.state.items()
        if engine.holding.has(parameter)
    }
    optimizer.state.clear()
    with torch.no_grad():
        engine.holding.restore(states, parameter_names(modules))


def _with_held(state: Any) -> Any:
    """The state with what is as large as parameters held back."""
    inside = state.get("state") if isinstance(state, Mapping) else None
    if not isinstance(inside, Mapping):
        return state
    held = {
        name: {
            key: _Held(value) if isinstance(value, Tensor) and value.dim() else value
            for key, value in slots.items()
        }
        if isinstance(slots, Mapping)
        else slots
        for name, slots in inside.items()
    }
    return {**state, "state": held}
