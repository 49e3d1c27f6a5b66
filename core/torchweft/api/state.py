"""State dictionaries keyed by the original module's parameter names.

The layout of an optimizer's state is that of ``torch.distributed.checkpoint.state_dict``:
``{"state": {name: {…}}, "param_groups": [{"params": [name, …], …}]}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.errors import CheckpointError

__all__ = [
    "load_named_module_state",
    "load_named_optimizer_state",
    "named_module_state",
    "named_optimizer_state",
    "parameter_names",
]

_SHOWN = 8


def named_module_state(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """``(name, value)`` of a module's state dictionary."""
    yield from module.state_dict().items()


def load_named_module_state(module: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
    """Fill ``module`` in place.

    Raises ``CheckpointError`` for a missing or unexpected name (``strict``) and, always, for a
    tensor of another shape.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    if strict and (missing or unexpected):
        raise CheckpointError(_mismatch(missing, unexpected, own, state))
    shapes = [
        f"'{name}' is {tuple(state[name].shape)} in the checkpoint and {tuple(own[name].shape)} "
        "in the model"
        for name in own
        if isinstance(own[name], Tensor)
        and isinstance(state.get(name), Tensor)
        and state[name].shape != own[name].shape
    ]
    if shapes:
        raise CheckpointError("the checkpoint is of another model: " + _first(shapes))
    module.load_state_dict(dict(state), strict=False)


def _mismatch(
    missing: list[str], unexpected: list[str], own: Mapping[str, Any], state: Mapping[str, Any]
) -> str:
    parts = []
    if missing:
        parts.append(f"the checkpoint has no {_first([repr(name) for name in missing])}")
    if unexpected:
        parts.append(f"the model has no {_first([repr(name) for name in unexpected])}")
    here = _first([repr(name) for name in state]) or "nothing"
    return "; ".join(parts) + f"; the checkpoint holds {here}"


def _first(sentences: Sequence[str]) -> str:
    more = len(sentences) - _SHOWN
    return ", ".join(sentences[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def parameter_names(modules: Sequence[nn.Module]) -> dict[int, str]:
    """``id(parameter) -> name``; with several modules, names start with the module's index."""
    names: dict[int, str] = {}
    for index, module in enumerate(modules):
        prefix = f"{index}." if len(modules) > 1 else ""
        for name, parameter in module.named_parameters():
            names.setdefault(id(parameter), prefix + name)
    return names


def named_optimizer_state(optimizer: Optimizer, modules: Sequence[nn.Module]) -> dict[str, Any]:
    """An optimizer's state keyed by the names of parameters in ``modules``.

    Raises ``CheckpointError`` when a parameter belongs to none of them.
    """
    names = parameter_names(modules)
    by_index = optimizer.state_dict()
    order = _ordered_names(optimizer, names)
    return {
        "state": {order[index]: value for index, value in by_index["state"].items()},
        "param_groups": [
            {**group, "params": [order[index] for index in group["params"]]}
            for group in by_index["param_groups"]
        ],
    }


def load_named_optimizer_state(
    optimizer: Optimizer, modules: Sequence[nn.Module], state: Mapping[str, Any]
) -> None:
    """Restore an optimizer from a state keyed by name, or by index as plain torch writes it.

    Groups are matched by the parameters they hold, so that their order does not matter.
    """
    if "state" not in state or "param_groups" not in state:
        raise CheckpointError(
            "this is not the state of an optimizer: it has no "
            f"{'state' if 'state' not in state else 'param_groups'!r}; it holds "
            f"{_first([repr(key) for key in state]) or 'nothing'}"
        )
    if all(isinstance(key, int) for group in state["param_groups"] for key in group["params"]):
        _load(optimizer, dict(state))
        return
    order = _ordered_names(optimizer, parameter_names(modules))
    groups = _match_groups(optimizer, order, state["param_groups"])
    index_of = {name: index for index, name in enumerate(order)}
    by_index = {
        index_of[name]: value for name, value in state["state"].items() if name in index_of
    }
    _load(optimizer, {"state": by_index, "param_groups": groups})


def _load(optimizer: Optimizer, state: dict[str, Any]) -> None:
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint's optimizer does not fit this {type(optimizer).__name__}: {error}"
        ) from error


def _ordered_names(optimizer: Optimizer, names: Mapping[int, str]) -> list[str]:
    order: list[str] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"{type(optimizer).__name__} holds a parameter of shape "
                    f"{tuple(parameter.shape)} that belongs to no model that was set up; "
                    "pass the model and its optimizer to fabric.setup() together"
                )
            order.append(names[id(parameter)])
    return order


def _match_groups(
    optimizer: Optimizer, order: Sequence[str], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The saved groups, in this optimizer's order, with indices for names."""
    of_name = {name: group for group in saved for name in group["params"]}
    missing = [name for name in order if name not in of_name]
    if missing:
        raise CheckpointError(
            f"the checkpoint's optimizer has no {_first([repr(n) for n in missing])}; it holds "
            f"{_first([repr(n) for n in of_name]) or 'no parameter'}"
        )
    groups, start = [], 0
    for group in optimizer.param_groups:
        indices = list(range(start, start + len(group["params"])))
        start += len(indices)
        held = {id(of_name[order[i]]): of_name[order[i]] for i in indices}
        if len(held) > 1:
            raise CheckpointError(
                f"{type(optimizer).__name__} has one group for parameters that the checkpoint "
                f"keeps in {len(held)}: {_first([repr(order[i]) for i in indices])}"
            )
        source: Mapping[str, Any] = next(iter(held.values())) if held else group
        groups.append({**source, "params": indices})
    return groups
