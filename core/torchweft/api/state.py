"""State dictionaries keyed by the original module's parameter names.

The layout of an optimizer's state is that of ``torch.distributed.checkpoint.state_dict``:
``{"state": {name: {…}}, "param_groups": [{"params": [name, …], …}]}``. Names are those of the
module as the user wrote it, also where ``torch.compile`` wrapped it or a part of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.errors import CheckpointError, listed

__all__ = [
    "as_written",
    "load_named_module_state",
    "load_named_optimizer_state",
    "module_versions",
    "named_module_state",
    "named_optimizer_state",
    "parameter_names",
    "unlike_shapes",
]

# What torch.compile's wrapper calls the module inside.
_COMPILED = "_orig_mod"

# Options of a group that say how a step is computed, not what. A checkpoint moves between devices
# that differ in which of these they can do, so the running optimizer keeps its own.
_OWN_OPTIONS = ("foreach", "fused", "capturable", "differentiable", "param_names")


# -- modules -------------------------------------------------------------------------------------


def named_module_state(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """``(name, value)`` of a module's state dictionary."""
    for name, value in module.state_dict().items():
        yield as_written(name), value


def module_versions(module: nn.Module) -> OrderedDict[str, Any]:
    """What torch keeps beside a state dictionary, as its ``_metadata``.

    Modules whose layout changed over time convert an old state by it; without it, they take any
    state for their oldest.
    """
    versions = getattr(module.state_dict(), "_metadata", None) or {}
    return OrderedDict((as_written(name), value) for name, value in versions.items())


def load_named_module_state(module: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
    """Fill ``module`` in place.

    Raises ``CheckpointError`` for a missing or unexpected name (``strict``) and, always, for a
    tensor of another shape. As with torch, what did match has been loaded by then.
    """
    loaded = _for_module(module, state)
    try:
        # Which names are missing is for torch to say: modules may convert what they are given.
        result = module.load_state_dict(loaded, strict=False)
    except RuntimeError as error:
        raise CheckpointError(_unlike(module, loaded, error)) from error
    if strict and (result.missing_keys or result.unexpected_keys):
        raise CheckpointError(_mismatch(result.missing_keys, result.unexpected_keys, state))


def as_written(name: str) -> str:
    """A name as the user wrote the module, without what ``torch.compile`` adds."""
    if _COMPILED not in name:
        return name
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _for_module(module: nn.Module, state: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A copy of ``state`` with the names that ``module`` has at present."""
    if not all(isinstance(name, str) for name in state):
        raise CheckpointError(
            f"this is not the state of a model: it holds {_quoted(state)}, and names are text"
        )
    own = module.state_dict()
    inside = {as_written(name): name for name in own}
    loaded = OrderedDict(
        (inside.get(as_written(name), name), value) for name, value in state.items()
    )
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        here = {as_written(name): name for name in getattr(own, "_metadata", {})}
        loaded._metadata = OrderedDict(  # type: ignore[attr-defined]
            (here.get(as_written(name), name), value) for name, value in versions.items()
        )
    return loaded


def _mismatch(missing: Sequence[str], unexpected: Sequence[str], state: Mapping[str, Any]) -> str:
    parts = []
    if missing:
        parts.append(f"the checkpoint has no {_quoted(map(as_written, missing))}")
    if unexpected:
        parts.append(f"the model has no {_quoted(map(as_written, unexpected))}")
    return "; ".join(parts) + f"; the checkpoint holds {_quoted(state) or 'nothing'}"


def _unlike(module: nn.Module, loaded: Mapping[str, Any], error: Exception) -> str:
    own = {
        name: value
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and not isinstance(value, nn.UninitializedParameter)
    }
    return unlike_shapes(loaded, own) or f"the checkpoint is of another model: {error}"


def unlike_shapes(saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> str:
    """What to say of tensors that have other shapes than those of the model; empty for none."""
    unlike = [
        f"'{as_written(name)}' is {tuple(saved[name].shape)} in the checkpoint and "
        f"{tuple(value.shape)} in the model"
        for name, value in own.items()
        if isinstance(saved.get(name), Tensor) and saved[name].shape != value.shape
    ]
    return f"the checkpoint is of another model: {listed(unlike)}" if unlike else ""


def _quoted(names: Any) -> str:
    return listed([repr(name) for name in names])


# -- optimizers ----------------------------------------------------------------------------------


def parameter_names(modules: Sequence[nn.Module]) -> dict[int, str]:
    """``id(parameter) -> name``; with several modules, names start with the module's index."""
    names: dict[int, str] = {}
    for index, module in enumerate(modules):
        prefix = f"{index}." if len(modules) > 1 else ""
        for name, parameter in module.named_parameters():
            names.setdefault(id(parameter), prefix + as_written(name))
    return names


def named_optimizer_state(optimizer: Optimizer, modules: Sequence[nn.Module]) -> dict[str, Any]:
    """An optimizer's state keyed by the names of parameters in ``modules``.

    Tensors are the optimizer's own. Raises ``CheckpointError`` when a parameter belongs to none
    of the modules.
    """
    order = _ordered_names(optimizer, parameter_names(modules))
    by_index = optimizer.state_dict()
    return {
        # State that belongs to no parameter has a key of the optimizer's choosing.
        "state": {
            order[key] if isinstance(key, int) else key: value
            for key, value in by_index["state"].items()
        },
        "param_groups": [
            {**group, "params": [order[index] for index in group["params"]]}
            for group in by_index["param_groups"]
        ],
    }


def load_named_optimizer_state(
    optimizer: Optimizer, modules: Sequence[nn.Module], state: Mapping[str, Any]
) -> None:
    """Restore an optimizer from a state keyed by name, or by index as plain torch writes it.

    By name, groups are matched by the parameters they hold, so that neither their order nor what
    the checkpoint holds beyond them matters. How a step is computed (``fused``, ``foreach``,
    ``capturable``) stays as this optimizer was made.

    Raises ``CheckpointError`` for what does not match.
    """
    saved = _groups(state)
    names = [key for group in saved for key in group["params"]]
    if all(isinstance(name, int) for name in names):
        groups, by_index = _check_sizes(optimizer, saved), dict(state["state"])
    else:
        order = _ordered_names(optimizer, parameter_names(modules))
        groups = _match_groups(optimizer, order, saved)
        index_of = {name: index for index, name in enumerate(order)}
        dropped = set(names).difference(index_of)
        by_index = {
            index_of.get(key, key): value
            for key, value in state["state"].items()
            if key not in dropped
        }
    kept = [
        {**_without(group, _OWN_OPTIONS), **{k: own[k] for k in _OWN_OPTIONS if k in own}}
        for own, group in zip(optimizer.param_groups, groups, strict=True)
    ]
    try:
        optimizer.load_state_dict({**state, "state": by_index, "param_groups": kept})
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint's optimizer does not fit this {type(optimizer).__name__}: {error}"
        ) from error


def _groups(state: Any) -> list[Mapping[str, Any]]:
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"this is not the state of an optimizer: it is a {type(state).__name__}, not a dict"
        )
    for key in ("state", "param_groups"):
        if key not in state:
            raise CheckpointError(
                f"this is not the state of an optimizer: it has no {key!r}; it holds "
                f"{_quoted(state) or 'nothing'}"
            )
    groups: list[Mapping[str, Any]] = state["param_groups"]
    if not isinstance(state["state"], Mapping) or not all(
        isinstance(group, Mapping) and "params" in group for group in groups
    ):
        raise CheckpointError(
            "this is not the state of an optimizer: every one of its 'param_groups' must be a dict "
            "with 'params', and its 'state' a dict"
        )
    return groups


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


def _check_sizes(
    optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    here = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in saved]
    if here != there:
        raise CheckpointError(
            f"the checkpoint's optimizer does not fit this {type(optimizer).__name__}: its groups "
            f"hold {_sizes(there)} parameters, and here {_sizes(here)}"
        )
    return saved


def _sizes(counts: Sequence[int]) -> str:
    return " and ".join(str(count) for count in counts) or "no"


def _match_groups(
    optimizer: Optimizer, order: Sequence[str], saved: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The saved groups, in this optimizer's order, with indices for names."""
    group_of = {name: position for position, group in enumerate(saved) for name in group["params"]}
    missing = [name for name in order if name not in group_of]
    if missing:
        raise CheckpointError(
            f"the checkpoint's optimizer has no {_quoted(missing)}; it holds "
            f"{_quoted(group_of) or 'no parameter'}"
        )
    groups: list[Mapping[str, Any]] = []
    start = 0
    for group in optimizer.param_groups:
        names = order[start : start + len(group["params"])]
        sources = [saved[position] for position in sorted({group_of[name] for name in names})]
        for other in sources[1:]:
            differing = _differing(sources[0], other)
            if differing:
                raise CheckpointError(
                    f"{type(optimizer).__name__} has one group for parameters that the checkpoint "
                    f"keeps in {len(sources)}, with different {_quoted(differing)}: "
                    f"{_quoted(names)}"
                )
        source = sources[0] if sources else group
        groups.append({**source, "params": list(range(start, start + len(names)))})
        start += len(names)
    return groups


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    ignored = ("params", *_OWN_OPTIONS)
    return [
        key
        for key in {**one, **other}
        if key not in ignored and not _equal(one.get(key), other.get(key))
    ]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one.cpu() == other.cpu()).all())
    return bool(one == other)


def _without(group: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in keys}
