"""Compiling the parts of a model one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from torchweft.api import map_leaves
from torchweft.errors import InvalidRequest

__all__ = ["check_compile", "compile_parts"]


def check_compile(value: Any) -> Mapping[str, Any] | None:
    """The arguments of ``torch.compile``; None where nothing is compiled.

    Raises ``InvalidRequest`` for what is neither a bool nor a dict.
    """
    if isinstance(value, bool):
        return {} if value else None
    if isinstance(value, Mapping):
        return value
    raise InvalidRequest(
        f"strategy 'fsdp' was given compile={value!r}; it takes true, false, or a dict with "
        "arguments of torch.compile"
    )


def compile_parts(parts: Iterable[nn.Module], arguments: Mapping[str, Any], divided: bool) -> None:
    """Compile each part in place, with the arguments of ``torch.compile``.

    ``divided``: layers of the model are divided between processes. Their outputs may still be on
    their way, and the gradient of such a tensor is lost where it goes into what was compiled
    (torch 2.13), so that it is waited for before.
    """
    for part in parts:
        part.compile(**arguments)
        if divided:
            run: Any = part._compiled_call_impl
            part._compiled_call_impl = _after_waiting(run)


def _after_waiting(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(*map_leaves(args, _waited), **map_leaves(kwargs, _waited))

    return call


def _waited(value: Any) -> Any:
    return _Waited.apply(value) if isinstance(value, AsyncCollectiveTensor) else value  # type: ignore[no-untyped-call]


class _Waited(torch.autograd.Function):
    """The tensor when it has arrived."""

    @staticmethod
    def forward(ctx: Any, value: Any) -> Tensor:
        arrived: Tensor = value.wait()
        return arrived

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
