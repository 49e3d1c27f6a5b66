"""What surrounds the forward pass of a sharded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["Surroundings", "free"]


def free(module: nn.Module) -> None:
    """Free what was gathered for a forward pass and not needed by a backward pass since.

    Parameters are the sharded ones again.
    """
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


class Surroundings:
    """Of the forward pass of one model, by hooks or around another method.

    Args:
        module: sharded.
        send: what is done before each pass, where there is anything.
    """

    def __init__(self, module: nn.Module, send: Callable[[], None] | None) -> None:
        self._send = send
        # Looked for once; a model's own methods may gather by parts.
        self._parts = [each for each in module.modules() if isinstance(each, FSDPModule)]
        self._entered: list[ExitStack | None] = []

    def hook(self, module: nn.Module) -> None:
        """Have every call of ``module`` surrounded."""
        # Before torch's own hook, which makes memory that has to be of the usual kind.
        module.register_forward_pre_hook(lambda *_: self._enter(), prepend=True)
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    @contextmanager
    def around(self) -> Iterator[None]:
        """The same, around a block."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        stack: ExitStack | None = None
        if torch.is_inference_mode_enabled():
            # Memory that is taken in that mode could never be trained with afterwards.
            stack = ExitStack()
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        self._entered.append(stack)
        if self._send is not None:
            self._send()

    def _leave(self) -> None:
        # Without gradients no backward pass will come, after which all is freed.
        if not torch.is_grad_enabled():
            for part in self._parts:
                part.reshard()
        stack: Any = self._entered.pop()
        if stack is not None:
            stack.close()
