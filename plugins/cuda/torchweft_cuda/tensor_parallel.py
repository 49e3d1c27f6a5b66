"""Dividing the layers of a model between processes, by the user's plan."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from torchweft.errors import InvalidRequest, did_you_mean

__all__ = ["Parallelize", "check_parallelize", "divide"]

#: What says how: a function of (model, mesh), a plan, where either is found, or None.
Parallelize = Callable[[nn.Module, DeviceMesh], Any] | Mapping[str, Any] | str | None


def check_parallelize(value: Any) -> Any:
    """The value of the option. Raises ``InvalidRequest`` for what is none."""
    fits = value is None or callable(value) or isinstance(value, Mapping)
    if fits or (isinstance(value, str) and ":" in value):
        return value
    raise InvalidRequest(
        f"strategy 'fsdp' was given parallelize={value!r}; it takes a function of (model, mesh), a "
        "plan {'name of a module': ColwiseParallel()}, or where one is found: 'module:name'"
    )


def divide(module: nn.Module, mesh: DeviceMesh, how: Any) -> None:
    """Divide the parameters of ``module`` over ``mesh["tensor"]``, in place.

    ``how`` is a checked value of the option; where it is None, the method ``parallelize(mesh)`` of
    the module's class says. A function or method may return a plan in place of carrying it out.

    Raises ``InvalidRequest`` where nothing says how, for names of a plan that are no module's, and
    for dimensions that do not divide.
    """
    logging.getLogger("torch.distributed.tensor._redistribute").addFilter(_in_two_steps)
    tied = _names_by_parameter(module)
    plan = _plan(module, mesh, how)
    if isinstance(plan, Mapping):
        _check_names(module, plan)
        parallelize_module(module, mesh["tensor"], dict(plan))
    elif plan is not None and not isinstance(plan, nn.Module):
        raise InvalidRequest(
            f"what divides {type(module).__name__} returned something of type "
            f"{type(plan).__name__}; it returns a plan {{'name of a module': ColwiseParallel()}}, "
            "or nothing where it has carried it out"
        )
    _check_divided(module, mesh["tensor"])
    _tie_again(module, tied)


def _in_two_steps(record: logging.LogRecord) -> bool:
    """Whether to let torch say that what is divided twice is gathered in two steps: no."""
    # It always is, for every checkpoint, and there is nothing that a user could do about it.
    return "_StridedShard" not in record.getMessage()


def _plan(module: nn.Module, mesh: DeviceMesh, how: Any) -> Any:
    if isinstance(how, str):
        how = _found(how)
    if how is None:
        how = getattr(type(module), "parallelize", None)
        if how is None:
            name = type(module).__name__
            raise InvalidRequest(
                f"strategy 'fsdp' was given tensor={mesh['tensor'].size()}, and nothing says how "
                f"{name} is divided: pass FSDPStrategy(tensor=…, parallelize=…) a function of "
                "(model, mesh) or a plan {'name of a module': ColwiseParallel()}, or give "
                f"{name} a method parallelize(self, mesh)"
            )
    return how(module, mesh) if callable(how) else how


def _found(target: str) -> Any:
    place, _, name = target.partition(":")
    try:
        found: Any = importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InvalidRequest(
            f"strategy 'fsdp' was given parallelize={target}, which cannot be loaded: {error}"
        ) from error
    return found


def _check_names(module: nn.Module, plan: Mapping[str, Any]) -> None:
    """Whether every name of a plan, parts of which may be patterns, is a module's."""
    names = [name for name, _ in module.named_modules() if name]
    for key in plan:
        # Without a name it is the module itself.
        if not key or any(_matches(name, key) for name in names):
            continue
        near = did_you_mean(key, names) or ";"
        raise InvalidRequest(
            f"the plan for tensor parallelism names '{key}', and {type(module).__name__} has no "
            f"module of that name{near} it has {', '.join(names[:8])}"
            f"{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        )


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _check_divided(module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        for placement in parameter.placements:
            dim = getattr(placement, "dim", None)
            if dim is None or parameter.shape[dim] % mesh.size() == 0:
                continue
            raise InvalidRequest(
                f"the plan for tensor parallelism divides '{name}', of shape "
                f"{tuple(parameter.shape)}, along dimension {dim}, and {parameter.shape[dim]} is "
                f"not divisible by tensor={mesh.size()}; leave that module out of the plan, or "
                f"make the dimension a multiple of {mesh.size()}"
            )


# -- parameters with several names -----------------------------------------------------------------


def _names_by_parameter(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _tie_again(module: nn.Module, tied: list[list[str]]) -> None:
    """Make parameters that were one before they were divided one again."""
    for names in tied:
        first, *others = (module.get_parameter(name) for name in names)
        for name, other in zip(names[1:], others, strict=True):
            if other is first:
                continue
            if _placed(other) != _placed(first):
                raise InvalidRequest(
                    f"'{names[0]}' and '{name}' are one parameter, and the plan for tensor "
                    f"parallelism divides it in two ways, {_placed(first)} and {_placed(other)}; "
                    "name the modules of both in the plan, so that both are divided along the "
                    "same dimension"
                )
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, first)


def _placed(parameter: nn.Parameter) -> str:
    """How it is divided, in torch's words."""
    return str(parameter.placements) if isinstance(parameter, DTensor) else "(not divided)"
